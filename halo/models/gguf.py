"""Models in GGUF files, which transformers reads into ordinary modules, dequantized.

What transformers would read wrongly is refused or corrected here. A teacher is unpacked once, into a model's folder in
the cache (`unpacked_folder`): to read the file takes transformers 20 seconds and more, each time.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from halo.errors import UserError, first_line
from halo.models.families import check_family
from halo.models.folders import check_no_code
from halo.run import content_digest
from hypenet.transfer import FAMILIES

NEEDED = ("gguf", "accelerate")
"""The packages that transformers needs to read them."""


def where(source: str | Path) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds `source`: a folder, a name on the hub, or a GGUF file.

    With them it runs no code from there, and does not ask on a terminal whether it may.

    Raises:
        UserError: it is a GGUF file, and a package that reads it is not installed; or as `check_no_code`.
    """
    check_no_code(Path(source).parent if is_gguf(source) else Path(source))
    if not is_gguf(source):
        return {"pretrained_model_name_or_path": source, "trust_remote_code": False}
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"{source} needs packages that are not installed: pip install {' '.join(missing)}")
    file = Path(source)
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf"


def check_gguf(file: Path) -> None:
    """Refuse what transformers cannot read, or would read as another model.

    Raises:
        UserError: the file is no GGUF, its architecture cannot be converted, or it holds what transformers drops: RoPE
            scaling, or biases (hypenet.transfer.FAMILIES).
    """
    where(file)  # raises if a package is missing
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise UserError(f"{file} is not a whole GGUF file: {first_line(error)}") from error
    check_family(architecture, file)
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    tensors = {tensor.name for tensor in reader.tensors}
    if (scaling is not None and scaling.contents() != "none") or "rope_freqs.weight" in tensors:
        raise UserError(f"{file} scales its RoPE, which transformers does not read from GGUF: take the model's folder")
    if not FAMILIES[architecture].gguf_biases and any(name.endswith(".bias") for name in tensors):
        raise UserError(f"{file} has biases, which transformers does not read from GGUF: take the model's folder")


def unpacked_folder(file: Path, dtype: str) -> Path:
    """Where the model of this file is unpacked, whether it is there or not: in the cache of the hub's client.

    Another file, dtype or version of transformers has another folder.
    """
    key = content_digest({"": file}, f"{dtype} {transformers.__version__}")
    return Path(constants.HF_HOME) / "halo" / f"{file.stem}-{key[:16]}"


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Set begin- and end-of-text as the file has them: transformers swaps them in Llama's tokenizers."""
    for name in ("bos", "eos"):
        token = getattr(config, f"{name}_token_id")
        setattr(tokenizer, f"{name}_token", None if token is None else tokenizer.convert_ids_to_tokens(token))
