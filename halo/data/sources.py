"""Text sources by name: a path, or a data set on the Hugging Face hub, which is downloaded first."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from halo.errors import UserError, first_line

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SAMPLE = "sample-10BT"


def fetch_source(source: str, sample: str | None = None) -> tuple[Path, str]:
    """The local path of a source, and its name for manifests.

    Args:
        source: a file or folder, or the name of a data set with the layout of FineWeb-Edu.
        sample: of a data set, by FineWeb-Edu's names: "sample-10BT" (the default), "sample-100BT", ..., or a dump,
            "CC-MAIN-2024-10". Files in the cache of the hub are not downloaded again; with HF_HUB_OFFLINE=1 all must
            be in the cache.

    Raises:
        UserError: there is no such source, it cannot be downloaded, or `sample` is given for a path.
    """
    if Path(source).exists():
        if sample:
            raise UserError(f"{source} is a path, and has no samples: leave --sample out")
        return Path(source), source
    sample = sample or SAMPLE
    folder = sample.replace("sample-", "sample/") if sample.startswith("sample-") else f"data/{sample}"
    try:
        snapshot = Path(snapshot_download(source, repo_type="dataset", allow_patterns=f"{folder}/*.parquet"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source} is not a path here, and cannot be fetched from the hub: {first_line(error)}"
        ) from error
    if not any((snapshot / folder).glob("*.parquet")):
        raise UserError(f"{source} has no {folder}/*.parquet on the hub: look up its samples and dumps there")
    return snapshot / folder, f"{source}@{snapshot.name}/{folder}"
