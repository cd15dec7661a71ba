"""Every command that writes: one process at a time, its own files only, the same settings, and on after a kill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from claims import CASES, Commands, contents, make_claims_world, written
from judge_server import JudgeServer

ALL = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with JudgeServer() as server:
        yield Commands(make_claims_world(tmp_path_factory.mktemp("claims") / "world"), server.url)


@pytest.fixture
def output(request: pytest.FixtureRequest, name: str) -> str:
    """A name that no other test has."""
    test = request.function.__name__.removeprefix("test_").replace("_", "-")
    return f"{name.replace(' ', '-')}-{test}{CASES[name].suffix}"


@ALL
def test_an_output_held_by_a_live_process_is_refused_by_its_number(commands: Commands, name: str, output: str) -> None:
    running = commands.start_and_stop(CASES[name], output)
    try:
        before = contents(commands.world / output)
        ended = commands.run(CASES[name], output)
        assert (ended.status, ended.out) == (2, "")
        assert f"{output}: held by a live process (process {running.process.pid} on " in ended.err
        assert contents(commands.world / output) == before
    finally:
        running.process.kill()
        running.process.join()


@ALL
def test_files_of_something_else_are_refused_and_left_alone(commands: Commands, name: str, output: str) -> None:
    place = commands.world / output
    mine = place if CASES[name].suffix else place / "thesis.tex"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    ended = commands.run(CASES[name], output)
    assert (ended.status, ended.out) == (2, "")
    assert mine.name in ended.err and "Traceback" not in ended.err
    assert [file.read_bytes() for file in commands.world.glob(f"{output}*/*")] in ([b"mine"], [])
    assert mine.read_text() == "mine"


@ALL
def test_a_file_in_the_folder_s_place_is_refused(commands: Commands, name: str, output: str) -> None:
    (commands.world / output).write_text("mine")
    below = f"{output}/below{CASES[name].suffix}"
    for place in [below] if CASES[name].suffix else [output, below]:
        ended = commands.run(CASES[name], place)
        assert (ended.status, ended.out) == (2, "")
        assert output in ended.err and "Traceback" not in ended.err
    assert (commands.world / output).read_text() == "mine"


@ALL
def test_what_was_killed_goes_on_and_its_leftovers_go(commands: Commands, name: str, output: str) -> None:
    case, place = CASES[name], commands.killed(name, output)
    kept = {file: (file.stat().st_ino, file.read_bytes()) for pattern in case.kept for file in place.glob(pattern)}
    assert len(kept) >= len(case.kept)
    ended = commands.run(case, output)
    assert ended.status == 0, ended
    for file, (number, content) in kept.items():
        assert file.stat().st_ino == number and file.read_bytes().startswith(content), file
    names = [file.name for one in written(place) for file in (one, *one.rglob("*"))]
    assert not [one for one in names if one.startswith((".tmp-", ".staging", ".publishing", ".drop-"))]
    calm = commands.finished_once(name)
    assert {one.replace(output, "") for one in contents(place)} == {
        one.replace(calm.name, "") for one in contents(calm)
    }


@ALL
def test_other_settings_are_refused_by_name(commands: Commands, name: str, output: str) -> None:
    case, place = CASES[name], commands.held_to_its_settings(name, output)
    before = contents(place)
    ended = commands.run(case, output, *case.other)
    assert (ended.status, ended.out) == (2, "")
    assert case.told in ended.err and "Traceback" not in ended.err
    assert contents(place) == before


@ALL
def test_what_has_finished_says_so_and_is_left_alone(commands: Commands, name: str) -> None:
    case, place = CASES[name], commands.finished_once(name)
    before = {file: content for file, (_, content) in contents(place).items()}
    ended = commands.run(case, place.name)
    assert ended.status == 0, ended
    assert case.finished in ended.out + ended.err
    assert {file: content for file, (_, content) in contents(place).items()} == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.forget is not None])
def test_an_output_of_a_release_that_knew_fewer_settings_goes_on(commands: Commands, name: str, output: str) -> None:
    case, place = CASES[name], commands.held_to_its_settings(name, output)
    assert case.forget is not None
    case.forget(place)
    kept = {file: file.stat().st_ino for pattern in case.kept for file in place.glob(pattern)}
    ended = commands.run(case, output)
    assert ended.status == 0, ended
    assert {file: file.stat().st_ino for file in kept} == kept  # nothing was begun anew
