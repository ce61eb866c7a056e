"""What is quantized from a GGUF file keeps all that the file says, and all tensors but those that are quantized."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from dashq import run
from dashq.model.decoder import Model
from dashq.model.gguf_layout import ARCHITECTURES
from dashq.model.location import locate
from dashq.results.checkpoint import open_checkpoint
from dashq.results.convert import convert
from dashq.results.verify import verify
from dashq_plugins.formats.gguf.carried import OWN, Original, architecture_of, copy_fields, copy_tensor
from dashq_plugins.formats.gguf.programs import in_float32
from dashq_plugins.formats.gguf.serializer import GgufSerializer
from gguf_results import FAMILIES, SIZES, recipe
from once import written_once
from pico import pico_model
from recipes import small_scheme
from tensors import tensors_of

# Files of Helium are read as Llamas, with rows of queries and keys in another order. Scales of matrices, which hold the
# factors of Falcon-H1, have no place in a model.
UNREAD = ("helium", "falcon_h1", "falcon_h1-normed")
EIGHT = {"scheme": small_scheme(32, bits=8, solver="rtn", router="routed"), "dtype": "float32"}


@pytest.fixture(scope="session")
def foreign(result: tuple[Path, Path]) -> Path:
    """A file of one family, with entries and a tensor that dashq does not know, and without one that it writes."""
    model, output = result
    reader = gguf.GGUFReader(output / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES or model.parent.name in UNREAD:
        pytest.skip(f"files of architecture {architecture} are not read, or not of {model.parent.name}")
    return written_once(model.parent / "foreign", lambda folder: _write_foreign(reader, folder)) / "foreign.gguf"


def _write_foreign(reader: gguf.GGUFReader, folder: Path) -> None:
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "foreign.gguf", reader.fields["general.architecture"].contents())
    writer.add_custom_alignment(64)
    writer.add_string("general.author", "somebody")
    writer.add_array("general.tags", ["one", "two"])
    for name, field in reader.fields.items():
        if not (name.startswith("GGUF.") or name in OWN or name == "tokenizer.ggml.add_eos_token"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def again(foreign: Path) -> Path:
    """The result of quantizing that file."""
    return written_once(foreign.parent / "again", lambda folder: run(recipe(foreign, folder, **EIGHT)))


def test_a_file_is_read_as_what_it_was_written_from(result: tuple[Path, Path], foreign: Path) -> None:
    written, original = open_checkpoint(result[1]), AutoModelForCausalLM.from_pretrained(result[0]).state_dict()
    model = Model(locate(str(foreign)), torch.device("cpu"), torch.float32)
    layout, tensors = Original(foreign, model.network.config).layout, tensors_of(model)
    for name, tensor in tensors.items():
        for key, values in ((name, tensor), *((f"{name}.{index}", part) for index, part in enumerate(tensor))):
            if (layer := key.removesuffix(".weight")) in written.layers:
                expected = written.quantized(layer).dequantize().to(tensor.dtype)
                assert expected.equal(values.mT if layout.transposed(name) else values), key
        if name.removesuffix(".weight") not in written.layers and "experts" not in name:
            assert tensor.float().allclose(original[name].float(), atol=1e-6), name


def test_the_file_says_what_it_said(foreign: Path, again: Path) -> None:
    before, after = (gguf.GGUFReader(path).fields for path in (foreign, again / "model.gguf"))
    kept = {name for name in before if not name.startswith("GGUF.") and name not in OWN}
    assert {name: after[name].contents() for name in kept} == {name: before[name].contents() for name in kept}
    assert {name: after[name].types for name in kept} == {name: before[name].types for name in kept}
    assert after["general.alignment"].contents() == 64
    assert after["general.file_type"].contents() == int(gguf.LlamaFileType.MOSTLY_Q8_0)
    assert after["tokenizer.ggml.add_eos_token"].contents() is False  # as it was, but said


def test_tensors_that_are_not_quantized_are_the_same_bytes(foreign: Path, again: Path) -> None:
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (foreign, again / "model.gguf")
    )
    assert before.keys() == after.keys()
    quantized = {name for name, tensor in after.items() if tensor.tensor_type.name == "Q8_0"}
    assert len(quantized) >= len(open_checkpoint(again).layers) // 4  # stacks hold four experts each
    for name in before.keys() - quantized:
        assert after[name].tensor_type == before[name].tensor_type
        assert after[name].data.tobytes() == before[name].data.tobytes(), name


def test_every_weight_is_what_the_solver_chose(again: Path) -> None:
    checks = list(verify(again, "gguf"))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def test_a_result_is_converted_with_all_that_its_file_says(again: Path, tmp_path: Path) -> None:
    asks = again.parent.name == "llama"  # a Modelfile takes a process, and is of the tokenizer that all families share
    second = convert(again, GgufSerializer(modelfile=asks), tmp_path / "second")
    fields = gguf.GGUFReader(second / "model.gguf").fields
    assert fields["general.author"].contents() == "somebody"
    assert ("Modelfile" in {path.name for path in second.iterdir()}) == asks


@pytest.mark.parametrize("program", ["llama.cpp-float32"])
def test_llama_cpp_computes_the_same(program: str, again: Path) -> None:
    pytest.importorskip("llama_cpp")
    if "gemma" in open_checkpoint(again).config().model_type:
        pytest.skip("the tokenizer of the tiny models is not of this family's kind")
    *_, logits = verify(again, program)
    assert logits.passed, logits


@pytest.mark.usefixtures("sentences")
@pytest.mark.parametrize(
    ("label", "packed"), [("llama", "token_embd.weight"), ("deepseek_v3", "blk.1.attn_v_b.weight")]
)
def test_what_the_file_had_packed_and_the_recipe_leaves_stays_packed_and_is_opened(
    label: str, packed: str, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    name, changes = FAMILIES[label]
    first = run(recipe(pico_model(name, tmp_path / "model", torch.float16, **SIZES | changes), tmp_path / "first"))
    reader = gguf.GGUFReader(first / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", architecture_of(reader))
    copy_fields(reader, writer)
    for tensor in reader.tensors:
        if tensor.name == packed:
            writer.add_tensor(packed, gguf.quantize(in_float32(tensor), Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            copy_tensor(tensor, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = run(recipe(tmp_path / "packed.gguf", tmp_path / "again", **EIGHT))
    before, after = (gguf.GGUFReader(path).tensors for path in (tmp_path / "packed.gguf", again / "model.gguf"))
    kept, written = (next(tensor for tensor in tensors if tensor.name == packed) for tensors in (before, after))
    assert kept.tensor_type == written.tensor_type == Kind.Q8_0
    assert kept.data.tobytes() == written.data.tobytes()
    *_, logits = verify(again, "llama.cpp-float32")
    assert logits.passed, logits
