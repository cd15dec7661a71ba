"""Runs of MT-Bench over the questions of `make_mt_bench`, judged by the judge server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dae_eval.judging.judges import JudgeChoice
from dae_eval.judging.mt_bench import MtBench, Side, run_mt_bench
from dae_eval.judging.mt_bench_results import Result
from judge_server import JudgeServer

from kd.served.connection import EndpointChoice


def job_of(world: Path, server: JudgeServer, output: str = "out", **settings: Any) -> MtBench:
    endpoint = EndpointChoice(server.url, "some-judge", "--judge-url", "OPENAI_API_KEY", None, 1)
    job = MtBench(
        side=Side(None, world / "ours.jsonl"),
        judge=JudgeChoice(endpoint),
        questions=str(world / "question.jsonl"),
        judge_prompts=str(world / "judge_prompts.jsonl"),
        references=str(world / "reference.jsonl"),
        output=world / output,
    )
    return replace(job, **settings)


def run(job: MtBench) -> Result:
    result = run_mt_bench(job)
    assert result is not None
    return result
