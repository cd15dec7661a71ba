"""A ranking of teachers as tables of 80 columns."""

from __future__ import annotations

from dae_eval.comparing.statistics import Estimate
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dae.rank_teachers.car import AtBeta, Facts, Ranking

BETAS_PER_TABLE = 6  # more do not fit beside a name into 80 columns


def show(ranking: Ranking, console: Console) -> None:
    console.print(f"{ranking.prompts} prompts, {ranking.rows} responses of each candidate")
    console.print("r: reward; L: the student's loss, nats per token; ppl: mean perplexity; ±: 95 %")
    console.print(facts_table(ranking.facts))
    if ranking.shift is not None:
        console.print(f"CAR uses r + {ranking.shift:.4g}: the lowest reward of all is 0 (shift: true)")
    names = [facts.name for facts in ranking.facts]
    for start in range(0, len(ranking.sweep), BETAS_PER_TABLE):
        console.print(car_table(names, ranking.sweep[start : start + BETAS_PER_TABLE]))
    console.print("Order ([bold]>[/] clearly ahead, [bold]=[/] the difference's interval contains 0)")
    for at in ranking.sweep:
        console.print(f"  beta {at.beta:<6g} {order_line(at)}")
    for line in verdict(ranking):
        console.print(line)


def facts_table(facts: tuple[Facts, ...]) -> Table:
    table = Table()
    table.add_column("candidate", overflow="fold", min_width=9)
    for title in ("r", "L", "tokens", "IFD", "ppl"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in facts:
        numbers = (number(value) for value in (each.tokens, each.ifd, each.perplexity))
        table.add_row(each.name, give_or_take(each.reward), give_or_take(each.loss), *numbers)
    return table


def car_table(names: list[str], sweep: tuple[AtBeta, ...]) -> Table:
    table = Table(title="CAR = r / (1 + beta L)", title_justify="left", padding=(0, 0))
    table.add_column("candidate", overflow="fold", min_width=9)
    for at in sweep:
        table.add_column(f"beta {at.beta:g}", justify="right", no_wrap=True)
    for name in names:
        found = [next(place.car for place in at.places if place.name == name) for at in sweep]
        table.add_row(name, *(give_or_take(car, "\n") for car in found))
    return table


def give_or_take(estimate: Estimate, between: str = " ") -> str:
    """A value and half of its interval's width."""
    return f"{number(estimate.value)}{between}[dim]±{(estimate.high - estimate.low) / 2:.1g}[/]"


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def order_line(at: AtBeta) -> str:
    """`a > b = c`: by CAR; `=` where the intervals do not separate neighbours."""
    signs = ["", *(" = " if place.tied else " > " for place in at.places[1:])]
    return escape("".join(sign + place.name for sign, place in zip(signs, at.places, strict=True)))


def verdict(ranking: Ranking) -> list[str]:
    """Whether the order is the same at every beta; if not, which candidates change places, and at which beta."""
    smallest, largest = (pick(at.beta for at in ranking.sweep) for pick in (min, max))
    orders = {tuple(place.name for place in at.places) for at in ranking.sweep}
    if not ranking.crossings:
        if smallest == largest:
            return []
        return [f"The order is the same at every beta from {smallest:g} to {largest:g}."]
    lines = [f"[bold]The order changes with beta[/] between {smallest:g} and {largest:g}:"]
    lines += [
        f"  {escape(each.below)} is ahead of {escape(each.above)} below beta {each.beta:.3g}, behind it above"
        for each in ranking.crossings
    ]
    leaders = list(dict.fromkeys(at.places[0].name for at in sorted(ranking.sweep, key=lambda at: at.beta)))
    if len(leaders) == 1:
        lines.append(f"  {escape(leaders[0])} is first at every beta shown." if len(orders) > 1 else "")
    else:
        lines.append(f"  First place: {escape(', then '.join(leaders))} as beta grows.")
    return [line for line in lines if line]
