"""Tensors of a checkpoint that no module reads, and refusals of those that cannot be left out."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set

from transformers import PretrainedConfig

from dashq.errors import CheckpointError

# Masks and frequencies in older checkpoints, which modules compute anew.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|(attn|attention|crossattention)\.bias)$")
# Heads that stand in the place of the one that predicts words.
HEAD = re.compile(
    r"(model\.)?(score|classifier|classification_head|regression_head|qa_outputs|(v|value|reward)_head)\."
)
# Layers that predict more than the next token, and the entries of `config.json` that count them.
PREDICTING = re.compile(r"(^|\.)(mtp[^.]*|nextn[^.]*|eh_proj|shared_head)\.")
PREDICTING_ENTRIES = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
NAMED = 4  # tensors in a warning


def unread_tensors(place: str, names: Mapping[str, str], parameters: Collection[str]) -> tuple[str, ...]:
    """The tensors that no module reads, by name in the files, but those that modules compute anew.

    `names` are the parameters that the files' tensors would belong to, `parameters` those of the network. Raises a
    `CheckpointError` for heads of classifiers, and for what stands beside a weight and changes what it computes.
    """
    unread = {key: name for key, name in names.items() if name not in parameters and not COMPUTED.search(name)}
    if heads := [key for key, name in unread.items() if HEAD.match(name)]:
        raise CheckpointError(
            f"{place} holds {min(heads)}, the head of a classifier or reward model, which the result would lose: dashq "
            "quantizes models that predict tokens. Take the language model that it was trained from, or save it as a "
            "...ForCausalLM without that head"
        )
    # By both names: experts lie singly in files and stacked in modules.
    read = {*parameters, *(names.keys() - unread.keys())}
    beside = [key for key, name in unread.items() if _stands_beside(key, read) or _stands_beside(name, read)]
    if biases := [key for key in beside if key.endswith("bias")]:
        raise CheckpointError(
            f"{place} holds {len(biases)} biases that no module reads, the first is {min(biases)}: its config.json "
            "says that there are none, and the result would compute something else. Switch them on there (as "
            "`attention_bias` or `mlp_bias` do in many models), or take weights that have none"
        )
    if beside:
        raise CheckpointError(
            f"{place} holds {len(beside)} tensors beside weights that no module reads, the first is {min(beside)}: "
            "they look like the scales of weights that are quantized already, in a way that is not read. Take the "
            "original weights, or save these dequantized in bfloat16 first"
        )
    return tuple(sorted(unread))


def warn_of_unread(unread: Sequence[str]) -> Iterable[str]:
    """A sentence with the number of the tensors that no module reads, and the first names; none where all are read."""
    if unread:
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        yield (
            f"{len(unread)} tensors of the model are read by no module of transformers and will not be in the result: "
            f"{', '.join(unread[:NAMED])}{more}"
        )


def clear_predicting_layers(config: PretrainedConfig, unread: Iterable[str]) -> tuple[str, ...]:
    """Set the entries of the configuration that count unread layers to 0; a sentence for each entry changed."""
    if not any(PREDICTING.search(key) for key in unread):
        return ()
    numbers = {name: number for name in PREDICTING_ENTRIES if (number := getattr(config, name, 0))}
    for name in numbers:
        setattr(config, name, 0)
    return tuple(
        f"`{name}` is 0 in the result's config.json, {number} in the model's: those layers are not kept"
        for name, number in numbers.items()
    )


def _stands_beside(name: str, read: Set[str]) -> bool:
    """The tensor shares its module with a weight that is read, or has the name of one with an ending as `_scale`."""
    module, _, last = name.rpartition(".")
    words = last.split("_")
    stems = ("_".join(words[:count]) for count in range(1, len(words)))
    return not read.isdisjoint([module, f"{module}.weight", *(f"{module}.{stem}" for stem in stems)])
