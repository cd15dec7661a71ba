"""`dae eval mt-bench` and `dae eval alpaca-eval`: parse, call, print."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dae.commands.stopping import going_on
from kd.config.schema import LARGEST_SEED
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.judging.authors import Author
    from dae_eval.judging.endpoints import EndpointChoice
    from dae_eval.judging.judges import JudgeChoice
    from dae_eval.judging.mt_bench import Side

MODEL_KEY, JUDGE_KEY = "MODEL_API_KEY", "OPENAI_API_KEY"
KEPT = "what was answered is kept"
MOST_AT_ONCE = 64  # requests under way at a time


class Mode(StrEnum):
    """How answers are judged."""

    SINGLE = "single"
    PAIRWISE = "pairwise"


class References(StrEnum):
    """Which reference answers a file holds."""

    ORIGINAL = "original"
    CORRECTED = "corrected"


class KindOfTask(StrEnum):
    """What a score counts in."""

    GENERAL = "general"
    DOMAIN = "domain"
    SHOWN = "shown"


Model = Annotated[
    str | None, typer.Option(metavar="CKPT", help="checkpoint, run folder or adapter; with --model-url its name there")
]
ModelUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help=f"OpenAI-compatible endpoint of the model; its key from {MODEL_KEY}"),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help=f"OpenAI-compatible endpoint of the judge; its key from {JUDGE_KEY}"),
]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="the judge's name at --judge-url")]
Judge = Annotated[str | None, typer.Option(metavar="CKPT", help="a local checkpoint as judge, instead of --judge-url")]
JudgePrompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="FastChat's judge_prompts.jsonl, or hub:OWNER/NAME/FILE")
]
JudgeMaxTokens = Annotated[int, typer.Option(min=1, help="longest judgment in tokens")]
Kind = Annotated[KindOfTask, typer.Option(help="what the score counts in: retention, gap closed, or neither")]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=LARGEST_SEED, help="the same seed gives the same answers of a checkpoint, and the same orders"
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="answers that a checkpoint writes at a time")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="chat template instead of the checkpoint's own: `plain` or a .jinja file"),
]
PerMinute = Annotated[
    float | None, typer.Option(metavar="N", min=0.001, help="at most N requests a minute to each endpoint")
]
Concurrency = Annotated[int, typer.Option(min=1, max=MOST_AT_ONCE, help="requests to an endpoint at a time")]
Price = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="the judge's price for a million tokens, for the estimate")
]
Estimate = Annotated[bool, typer.Option("--estimate", help="tell calls, tokens and price, and ask the judge nothing")]
Output = Annotated[Path | None, typer.Option(metavar="DIR", help="a folder for everything that comes of it")]


def mt_bench(
    model: Model = None,
    model_url: ModelUrl = None,
    answers: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="answers in FastChat's format; with --model they count as that model's"),
    ] = None,
    judgments: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="finished judgments in FastChat's format: only scored; repeats"),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="whose judgments, where --judgments holds several models'")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="FastChat's question.jsonl, or hub:OWNER/NAME/FILE")
    ] = None,
    references: Annotated[
        str | None, typer.Option(metavar="FILE", help="reference answers for math, reasoning and coding, in its format")
    ] = None,
    references_kind: Annotated[
        References, typer.Option(help="whether these are FastChat's own or corrected ones; recorded")
    ] = References.ORIGINAL,
    judge_prompts: JudgePrompts = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge: Judge = None,
    judge_max_tokens: JudgeMaxTokens = 2048,
    mode: Annotated[Mode | None, typer.Option(help="rate each answer, or compare (default with --against)")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR", help="whom to compare with: answers, an mt-bench output, or a checkpoint"),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="judge so many times and tell the spread")] = 1,
    strict: Annotated[
        bool,
        typer.Option("--strict/--compatible", help="every question and turn once, or just as FastChat counts"),
    ] = True,
    kind: Kind = KindOfTask.GENERAL,
    output: Output = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer to one turn in tokens")] = 1024,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    chat_template: ChatTemplate = None,
    requests_per_minute: PerMinute = None,
    concurrency: Concurrency = 4,
    price_per_million_tokens: Price = None,
    estimate: Estimate = False,
) -> None:
    """Judge a model's answers to MT-Bench; the same command goes on after a stop and asks nothing twice."""
    refuse_missing("mt-bench", ("--questions", questions), ("--output", output))
    assert questions is not None and output is not None
    pairwise = mode is Mode.PAIRWISE or (mode is None and against is not None)
    from dae_eval.judging.authors import Author
    from dae_eval.judging.mt_bench import FinishedJudgments, MtBench, run_mt_bench, score_judgments
    from dae_eval.judging.mt_bench_results import result_lines

    served = endpoint(model_url, model, "--model-url", MODEL_KEY, requests_per_minute, concurrency)
    author = None if model is None else Author(model, served, max_new_tokens, seed, batch_size, chat_template)
    side = side_of(author, answers)
    if judgments:
        way: Literal["pairwise", "single"] = "pairwise" if pairwise else "single"
        finished = FinishedJudgments(tuple(judgments), questions, output, way, model_id, side, strict, kind.value)
        with going_on(output, KEPT):
            result = score_judgments(finished)
        tell(output, result_lines(result))
        return
    refuse_misfits(side, model_id, pairwise, against)
    refuse_missing("mt-bench", ("--judge-prompts", judge_prompts))
    assert side is not None and judge_prompts is not None
    job = MtBench(
        side=side,
        judge=judge_of(judge_url, judge_model, judge, judge_max_tokens, batch_size, requests_per_minute, concurrency),
        questions=questions,
        judge_prompts=judge_prompts,
        output=output,
        references=references,
        references_kind=references_kind.value,
        against=None if against is None else opponent(against, author, max_new_tokens, seed, batch_size),
        repeat=repeat,
        strict=strict,
        kind=kind.value,
        price=price_of(price_per_million_tokens),
        only_estimate=estimate,
    )
    with going_on(output, KEPT):
        judged = run_mt_bench(job)
    if judged is not None:
        tell(output, result_lines(judged))


def refuse_misfits(side: Side | None, model_id: str | None, pairwise: bool, against: str | None) -> None:
    """Raise UserError for flags of mt-bench that do not go together where a judge is to be asked."""
    if side is None:
        raise UserError("mt-bench: give --model CKPT, --answers FILE or --judgments FILE")
    if model_id is not None:
        raise UserError("--model-id: goes with --judgments")
    if pairwise != (against is not None):
        raise UserError("--mode pairwise and --against go together: name whom to compare with, or leave both out")


def alpaca_eval(
    model: Model = None,
    model_url: ModelUrl = None,
    instructions: Annotated[
        str | None, typer.Option(metavar="FILE", help="AlpacaEval's instructions, or hub:OWNER/NAME/FILE")
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="finished outputs in its format; with --model they count as that model's"),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(metavar="FILE", help="finished annotations in its format: only scored")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="FILE", help="outputs to compare with, in its format; without: no judging")
    ] = None,
    judge_prompts: JudgePrompts = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge: Judge = None,
    judge_max_tokens: JudgeMaxTokens = 2048,
    gamed_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="df_gamed.csv, for the length-controlled rate (needs dae-align[alpaca])"),
    ] = None,
    kind: Kind = KindOfTask.GENERAL,
    output: Output = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest output in tokens")] = 2048,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    chat_template: ChatTemplate = None,
    requests_per_minute: PerMinute = None,
    concurrency: Concurrency = 4,
    price_per_million_tokens: Price = None,
    estimate: Estimate = False,
) -> None:
    """Write a model's AlpacaEval outputs, annotate them against a baseline's, and tell the win rate."""
    refuse_missing("alpaca-eval", ("--output", output))
    assert output is not None
    from dae_eval.judging.alpaca import AlpacaEval, Annotating, result_lines, run_alpaca_eval
    from dae_eval.judging.authors import Author

    served = endpoint(model_url, model, "--model-url", MODEL_KEY, requests_per_minute, concurrency)
    author = None if model is None else Author(model, served, max_new_tokens, seed, batch_size, chat_template)
    annotating = None
    if baseline is not None:
        refuse_missing("alpaca-eval --baseline", ("--judge-prompts", judge_prompts))
        assert judge_prompts is not None
        chosen = judge_of(judge_url, judge_model, judge, judge_max_tokens, batch_size, requests_per_minute, concurrency)
        price = price_of(price_per_million_tokens)
        annotating = Annotating(chosen, judge_prompts, baseline, seed, price, estimate)
    elif judge_url is not None or judge is not None:
        raise UserError("--judge-url, --judge: want --baseline FILE, the outputs to compare with")
    job = AlpacaEval(output, author, instructions, outputs, annotations, annotating, gamed_file, kind.value)
    with going_on(output, KEPT):
        result = run_alpaca_eval(job)
    if result is not None:
        tell(output, result_lines(result))


def tell(output: Path, lines: Iterable[str]) -> None:
    """Print where the result lies, and the result."""
    typer.echo("\n".join([str(output), *lines]))


def register(app: typer.Typer) -> None:
    """Put both commands on the `eval` sub-app."""
    app.command("mt-bench")(mt_bench)
    app.command("alpaca-eval")(alpaca_eval)


def refuse_missing(command: str, *flags: tuple[str, object]) -> None:
    """Raise UserError naming the flags that were not given."""
    missing = [name for name, value in flags if value is None]
    if missing:
        raise UserError(f"{command}: needs {', '.join(missing)} (--help explains)")


def endpoint(
    url: str | None, model: str | None, flag: str, key_name: str, requests_per_minute: float | None, concurrency: int
) -> EndpointChoice | None:
    """The endpoint that the flags name, or None. Raises UserError without a model's name or with a bad address."""
    if url is None:
        return None
    if model is None:
        raise UserError(f"{flag}: say with {flag.removesuffix('-url')} NAME which model there")
    from dae_eval.judging.endpoints import EndpointChoice, plain_url

    choice = EndpointChoice(url, model, flag, key_name, requests_per_minute, concurrency)
    plain_url(choice)
    return choice


def judge_of(
    url: str | None,
    name: str | None,
    checkpoint: str | None,
    max_tokens: int,
    batch_size: int,
    requests_per_minute: float | None,
    concurrency: int,
) -> JudgeChoice:
    """The judge that the flags name. Raises UserError where they name none, or two."""
    from dae_eval.judging.judges import JudgeChoice

    if (url is None) == (checkpoint is None) or (url is None) != (name is None):
        raise UserError("the judge: give --judge-url URL with --judge-model NAME, or --judge CKPT for a local one")
    served = endpoint(url, name, "--judge-url", JUDGE_KEY, requests_per_minute, concurrency)
    return JudgeChoice(served, checkpoint or "", max_tokens, batch_size)


def side_of(author: Author | None, answers: str | None) -> Side | None:
    """Whose answers, and where they are if they are there; None where neither is given."""
    from dae_eval.judging.fastchat_files import local_file
    from dae_eval.judging.mt_bench import Side

    if author is None and answers is None:
        return None
    return Side(author, None if answers is None else local_file(answers, "--answers"))


def opponent(against: str, author: Author | None, max_new_tokens: int, seed: int, batch_size: int) -> Side:
    """Whom --against means: a file of answers, the output of an earlier run, or a checkpoint."""
    from dae_eval.judging.authors import Author
    from dae_eval.judging.mt_bench import ANSWERS, Side

    place = Path(against)
    if place.is_file():
        return Side(None, place)
    if (place / ANSWERS).is_file():
        return Side(None, place / ANSWERS)
    template = None if author is None else author.chat_template
    return Side(Author(against, None, max_new_tokens, seed, batch_size, template))


def price_of(text: str | None) -> tuple[float, float] | None:
    """IN,OUT as two numbers. Raises UserError."""
    if text is None:
        return None
    parts = text.split(",")
    try:
        prices = [float(part) for part in parts]
    except ValueError:
        prices = []
    if len(prices) != 2 or not all(0 <= price < float("inf") for price in prices):
        raise UserError(f"--price-per-million-tokens {text}: wants two numbers, such as 2.5,10")
    return prices[0], prices[1]
