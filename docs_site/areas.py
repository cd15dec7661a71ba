"""The areas of the troubleshooting page, by the files that raise their messages."""

from __future__ import annotations

MACHINE = "The machine (exit status 4)"

# The longest prefix that fits a file decides.
AREAS: dict[str, tuple[str, ...]] = {
    "Command and recipe": ("kd/config/", "dae/", "kd/training/settings.py", "kd/stages/distill_recipe.py",
                           "kd/losses/divergence_recipe.py"),
    "Rows": ("kd/data/", "dae/recorded_rows.py"),
    "Chat templates and tokenizers": ("kd/data/chat", "kd/data/drafts.py", "kd/data/special_text.py",
                                      "kd/data/tokenizer_audit.py", "dae/templates.py", "dae/alignment.py"),
    "Checkpoints and adapters": ("kd/models/", "dae/earlier_student.py", "kd/stages/", "dae/start.py"),
    "Losses": ("kd/losses/",),
    "Run folder, resuming, pipelines": ("kd/runs/", "kd/training/", "dae/pipeline/", "dae/exit_status.py"),
    "Cache and teachers on servers": ("kd/cache/", "kd/served/", "kd/stages/caching.py"),
    "Several processes": ("kd/training/wrapping.py", "dae/checking/processes.py"),
    "Sampling": ("dae/sampling/",),
    "Merging": ("dae/merging/",),
    "Ranking teachers": ("dae/rank_teachers/",),
    "Demo": ("dae/demo/",),
    "Evaluation and report": ("eval/dae_eval/", "dae/commands/report.py", "dae/commands/evaluation.py"),
    "Judges": ("eval/dae_eval/judging/", "dae/commands/judging.py"),
}  # fmt: skip
