"""Models in GGUF files, which transformers reads into ordinary modules, dequantized.

What it would read wrongly is refused or mended here.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from halo.errors import UserError

NEEDED = ("gguf", "accelerate")
"""The packages that transformers needs for it."""


def where(source: str | Path) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds `source`: a folder, a name on the hub, or a GGUF file.

    Raises:
        UserError: it is a GGUF file, and a package that reads it is not installed.
    """
    if not is_gguf(source):
        return {"pretrained_model_name_or_path": source}
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"{source} needs packages that are not installed: pip install {' '.join(missing)}")
    file = Path(source)
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf"


def check_gguf(file: Path, architectures: tuple[str, ...]) -> None:
    """Refuse what transformers cannot read, or would read as another model.

    Raises:
        UserError: the file is no GGUF, its architecture is not among `architectures`, or it holds what transformers
            leaves out: RoPE scaling, or biases where the architecture has none.
    """
    where(file)  # says what is not installed
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise UserError(f"{file} is not a whole GGUF file: {error}") from error
    if architecture not in architectures:
        raise UserError(f"the teacher at {file} is a '{architecture}'; supported: {', '.join(architectures)}")
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    tensors = {tensor.name for tensor in reader.tensors}
    if (scaling is not None and scaling.contents() != "none") or "rope_freqs.weight" in tensors:
        raise UserError(f"{file} scales its RoPE, which transformers does not read from GGUF: take the model's folder")
    if architecture != "qwen2" and any(name.endswith(".bias") for name in tensors):
        raise UserError(f"{file} has biases, which transformers does not read from GGUF: take the model's folder")


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, file: str | Path) -> None:
    """Set the ends of a text as the file has them: of Llama's tokenizers, transformers swaps them."""
    config = AutoConfig.from_pretrained(**where(file))
    for name in ("bos", "eos"):
        token = getattr(config, f"{name}_token_id")
        setattr(tokenizer, f"{name}_token", None if token is None else tokenizer.convert_ids_to_tokens(token))
