"""Where a text source is: a path, or a data set on the Hugging Face hub, whose files are downloaded first."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from halo.errors import UserError

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SAMPLE = "sample-10BT"


def fetch_source(source: str, sample: str | None = None) -> tuple[Path, str]:
    """The local path of a source, and the name that stands for it in manifests.

    Args:
        source: a file or folder, or the name of a data set that is laid out as FineWeb-Edu is.
        sample: FineWeb-Edu's own names: "sample-10BT", "sample-100BT", ..., or a dump, "CC-MAIN-2024-10". Files that
            are in the hub's cache are not downloaded again; with HF_HUB_OFFLINE=1 all must be there.

    Raises:
        UserError: there is no such source, it cannot be downloaded, or a sample of a path is asked for.
    """
    if Path(source).exists():
        if sample:
            raise UserError(f"{source} is a path, of which there are no samples: leave --sample out")
        return Path(source), source
    sample = sample or SAMPLE
    folder = sample.replace("sample-", "sample/") if sample.startswith("sample-") else f"data/{sample}"
    try:
        snapshot = Path(snapshot_download(source, repo_type="dataset", allow_patterns=f"{folder}/*.parquet"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source} is no path here, and cannot be had from the hub: {reason}") from error
    if not any((snapshot / folder).glob("*.parquet")):
        raise UserError(f"{source} has no {folder}/*.parquet on the hub: see its samples and dumps there")
    return snapshot / folder, f"{source}@{snapshot.name}/{folder}"
