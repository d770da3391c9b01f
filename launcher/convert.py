"""All of HALO in one command: from a Transformer and a folder of text to the hybrid and the tables of its evaluation.

deepspeed launcher/convert.py --until niah
deepspeed launcher/convert.py --preset smollm2-135m --teacher=SmolLM2-135M-Instruct.gguf --text=books
"""

from halo.cli import main
from halo.job import Job

TABLES = {"niah": "niah.md", "csr": "csr.md"}
"""Of the stages that evaluate: stage -> its table, a file in the stage's folder."""


def convert(job: Job) -> None:
    from halo.distributed import say  # not before the command line is read
    from halo.pipeline import run_stages

    run = run_stages(job).run
    for stage, table in TABLES.items():
        if stage in job.stages:
            say("\n" + (run / stage / table).read_text())
            say(f"table  {run / stage / table}")
    if "niah" in job.stages:
        say(f"plot   {run / 'niah' / 'niah.png'}   numbers {run / 'niah' / 'niah.json'}")
    if "export" in job.stages:
        say(f"model  {run / 'export' / 'model'}   (AutoModelForCausalLM.from_pretrained, trust_remote_code=True)")
    say(f"curves tensorboard --logdir {run}")


if __name__ == "__main__":
    main(None, description=__doc__, work=convert)
