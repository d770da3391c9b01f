"""All of HALO on the embedded default: from a small Transformer to a hybrid with long recall, and a small Table 2.

deepspeed launcher/demo.py
"""

from halo.cli import command, tables_to
from halo.job import Job


def demo(job: Job) -> None:
    from halo.pipeline import run_stage, say  # not before the command line is read

    context = run_stage(job, "niah")
    evaluation = context.run / "niah"
    say("\n" + (evaluation / "niah.md").read_text())
    say(f"table  {evaluation / 'niah.md'}   plot  {evaluation / 'niah.png'}   numbers  {evaluation / 'niah.json'}")
    say(f"model  {context.run / 'export' / 'model'}   (AutoModelForCausalLM.from_pretrained, trust_remote_code=True)")
    say(f"curves tensorboard --logdir {context.run}")


if __name__ == "__main__":
    command(demo, description=__doc__, stage="niah", tables=tables_to("niah"), prepare=True)
