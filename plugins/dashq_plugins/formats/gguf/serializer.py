"""GGUF: one file for llama.cpp, with plain blocks or with super-blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from jaxtyping import Shaped
from torch import Tensor

from dashq import (
    Container,
    Grid,
    Grouping,
    PlanError,
    Program,
    Quantized,
    Serializer,
    StoredLayer,
    hookimpl,
)
from dashq_plugins.formats.gguf.blocks import named, type_of
from dashq_plugins.formats.gguf.carried import original_of
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.falcon_h1 import refuse_packed_embeddings
from dashq_plugins.formats.gguf.file import GgufFile
from dashq_plugins.formats.gguf.latent import refuse_turned_keys
from dashq_plugins.formats.gguf.modelfile import MODELFILE
from dashq_plugins.formats.gguf.names import TEXT_ALONE, in_file, layout_of, place
from dashq_plugins.formats.gguf.programs import open_in_float32_with_llama_cpp, open_with_gguf, open_with_llama_cpp
from dashq_plugins.formats.gguf.states import check_columns
from dashq_plugins.formats.gguf.tokenizer import Vocabulary
from dashq_plugins.formats.words import refuse_bits, refuse_order, refuse_uneven_stacks

if TYPE_CHECKING:
    import transformers


TwoBits = Literal["Q2_K", "IQ2_S"]
ThreeBits = Literal["Q3_K", "IQ3_S"]
FourBits = Literal["Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0"]
FiveBits = Literal["Q5_K", "Q5_1", "Q5_0"]
NAMES: Mapping[int, tuple[str, ...]] = {
    2: get_args(TwoBits),
    3: get_args(ThreeBits),
    4: get_args(FourBits),
    5: get_args(FiveBits),
    6: ("Q6_K",),
    8: ("Q8_0",),
}


class GgufSerializer(Serializer):
    """2 to 6 bits in super-blocks (Q2_K to Q6_K), or 4, 5 and 8 in plain blocks (Q4_0, Q4_1, …), for llama.cpp.

    Run it with `llama-cli -m FOLDER/model.gguf`, or load it with `llama_cpp.Llama("FOLDER/model.gguf")`.
    Layers may differ; the `type` of a scheme or an override names one, and `two_bits` to `five_bits` say what 2 to 5
    bits are without a name. Super-blocks of 256 columns need a solver that supports them. Types ending in 0 are
    symmetric, those in 1 have real zeros; those that begin with IQ have codebooks, come nearer to the weights than
    others of their size, and take longer to solve; IQ4_NL takes any multiple of 32 columns.
    For models of GGUF files, whose metadata and tokenizer are kept, and from safetensors for Llama, Mistral, Mixtral,
    Qwen 2 to 3.5 with their mixtures, Gemma 1 to 4, gpt-oss, DeepSeek, GLM, Phi, Granite, OLMo and many others; there
    `pre_tokenizer` is llama.cpp's name for how text is cut before it is merged; without one it is found from the
    tokenizer. Of a Gemma, a Llama 4, a Mistral 3, a Llava or a Qwen-VL that takes images or sounds the file holds the
    text model.
    """

    name = "gguf"
    stacks_experts = True
    holds_embeddings = True
    holds_head = True
    library = "gguf"
    openings: ClassVar[Mapping[str, str]] = {
        "llama.cpp": "$ llama-cli -m model.gguf -p 'The capital of France is'",
        "llama-cpp-python": 'from llama_cpp import Llama\n\nmodel = Llama("model.gguf")\n',
        "Ollama": "$ ollama create my-model -f Modelfile && ollama run my-model",
    }
    text_alone = TEXT_ALONE
    files = (GgufFile.file, MODELFILE)
    two_bits: TwoBits = "Q2_K"
    three_bits: ThreeBits = "Q3_K"
    four_bits: FourBits = "Q4_K"
    five_bits: FiveBits = "Q5_1"
    pre_tokenizer: str | None = None
    modelfile: bool = False

    def grid(self, bits: int) -> Grid:
        usual = {2: self.two_bits, 3: self.three_bits, 4: self.four_bits, 5: self.five_bits}
        refuse_bits(bits, tuple(NAMES), self.name)
        return named(usual.get(bits, NAMES[bits][0])).grid

    def types(self, bits: int) -> Mapping[str, Grid]:
        refuse_bits(bits, tuple(NAMES), self.name)
        return {name: named(name).grid for name in NAMES[bits]}

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q, kind = quantized, type_of(quantized.grid)
        refuse_order(q, self.name)
        if q.grouping.size != kind.size or q.grouping.columns % kind.columns:
            plain = {"Q4_K": "; `type: IQ4_NL` or `Q4_1` needs", "Q5_K": "; `type: Q5_1` needs"}.get(kind.name)
            others = f"{plain} groups and multiples of 32" if plain else ""
            raise PlanError(
                f"format gguf at {q.grid.bits} bits ({kind.name}) needs groups of {kind.size} and a multiple of "
                f"{kind.columns} columns, not groups of {q.grouping.size} and {q.grouping.columns} columns{others}"
            )
        return {"weight": kind.to_bytes(q)}

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        codes, scale, offset = type_of(grid).from_bytes(tensors["weight"])
        grouping = Grouping(columns=columns, size=size)
        return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=grid)

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
        source: Path | None,
    ) -> None:
        from dashq.model.transformers_internals import tied_weights  # it imports transformers

        original = original_of(source, network.config)
        layout = original.layout if original else layout_of(network.config)
        refuse_turned_keys(layout, layers)
        if original is None:  # else the file has a place and a word for all there is
            for name in network.state_dict():
                if name not in tied_weights(network) and not layout.entry(name):
                    in_file(layout, place(name)[0])
            check_config(layout)
            Vocabulary(tokenizer, self.pre_tokenizer)
        check_columns(layout, layers)
        refuse_packed_embeddings(layout, layers)
        refuse_uneven_stacks(network, layers, self.name)

    def container(self, config: "transformers.PretrainedConfig") -> Container:
        return GgufFile(self.pre_tokenizer, self.modelfile)


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [GgufSerializer]


@hookimpl
def dashq_programs() -> list[Program]:
    name = GgufSerializer.name
    return [
        Program(name="gguf", format=name, open=open_with_gguf),
        Program(name="llama.cpp", format=name, open=open_with_llama_cpp),
        Program(name="llama.cpp-float32", format=name, open=open_in_float32_with_llama_cpp),
    ]
