"""Judges in process: the log of replies, prompts, cost, and local checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmark_files import NO_SYSTEM_TEMPLATE, make_chat_checkpoint
from dae_eval.judging.asking import LENGTH, NO_ROOM, Reply, ReplyLog, Request, ask_all, unanswered
from dae_eval.judging.fastchat_files import JudgePrompt
from dae_eval.judging.judges import JudgeChoice, describe_cost, judge_request, refuse_crowded
from dae_eval.judging.local_chat import DrawPerRow, LocalChat, open_local_chat
from dae_eval.models import locate
from lossy_tokenizers import make_lossy_checkpoint
from peft import PeftModel
from pico import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_adapter

from kd.errors import MachineError, UserError


def request(key: str, text: str = "", **settings: object) -> Request:
    messages = ({"role": "system", "content": "Judge."}, {"role": "user", "content": text or f"prompt {key}"})
    return Request(key, messages, **{"temperature": 0.0, "max_tokens": 12, **settings})  # type: ignore[arg-type]


# -- the log -----------------------------------------------------------------------------------------------------------


class Counting:
    """A model that counts what it is asked, and stops after `limit` answers."""

    def __init__(self, limit: int = 1000) -> None:
        self.asked: list[str] = []
        self.limit = limit

    def replies(self, requests: list[Request], wanted: set[str]) -> Iterator[tuple[str, Reply]]:
        for one in requests:
            if one.key in wanted:
                if len(self.asked) == self.limit:
                    raise MachineError("enough")
                self.asked.append(one.key)
                yield one.key, Reply(f"reply to {one.key}", "stop")


def test_a_stop_loses_no_reply_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    requests = [request(str(number)) for number in range(6)]
    first = Counting(limit=4)
    with pytest.raises(MachineError):
        ask_all(lambda: first, requests, ReplyLog(path), "replies")  # type: ignore[arg-type,return-value]
    with path.open("a") as file:
        file.write('{"key": "4", "reply": "torn')
    second = Counting()
    found = ask_all(lambda: second, requests, ReplyLog(path), "replies")  # type: ignore[arg-type,return-value]
    assert (first.asked, second.asked) == (["0", "1", "2", "3"], ["4", "5"])
    assert [found[str(number)].text for number in range(6)] == [f"reply to {number}" for number in range(6)]
    assert len(path.read_text().splitlines()) == 6

    def never() -> Counting:
        raise AssertionError("everything is there: no model is opened")

    assert ask_all(never, requests, ReplyLog(path), "replies") == found  # type: ignore[arg-type]


def test_a_reply_counts_only_for_the_request_it_was_given_to(tmp_path: Path) -> None:
    log = ReplyLog(tmp_path / "replies.jsonl")
    log.add(request("1", "old"), Reply("x", "stop"))
    assert unanswered([request("1", "new"), request("1", "old", temperature=0.5)], log, lambda _: True) != []
    assert unanswered([request("1", "old")], log, lambda _: True) == []
    assert unanswered([request("1", "old")], log, lambda reply: reply.text != "x") != []


def test_a_broken_line_of_the_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"key": "1"}\n')
    with pytest.raises(UserError, match=r"replies\.jsonl:1"):
        ReplyLog(path)


# -- prompts and cost --------------------------------------------------------------------------------------------------


def test_prompts_are_filled_in_and_faults_named() -> None:
    judge = JudgeChoice(None, "somewhere")
    prompt = JudgePrompt("p", "single", "sys", "{question} {{kept}}", "[[rating]]")
    filled = judge_request(judge, prompt, "k", {"question": "why {x}?"}, "prompts.jsonl")
    assert [message["content"] for message in filled.messages] == ["sys", "why {x}? {kept}"]
    for template in ("{missing}", "{question", "{0}", "{question.no_such_thing}"):
        with pytest.raises(UserError, match=r"prompts\.jsonl: prompt p"):
            judge_request(judge, JudgePrompt("p", "single", "", template, ""), "k", {"question": "q"}, "prompts.jsonl")


def test_the_estimate_counts_calls_tokens_and_only_given_prices() -> None:
    requests = [request(str(number), "x" * 394) for number in range(10)]
    line = describe_cost("judge", requests, 3, (2000.0, 10_000.0))
    # 10 prompts of 400 characters and 10 x 12 reply tokens; 1000 x 0.002, and 120 x 0.01 more.
    assert re.findall(r"[\d.,]*\d", line) == ["10", "3", "1,000", "120", "2.00", "3.20"]
    assert re.findall(r"[\d.,]*\d", describe_cost("judge", requests, 0, None)) == ["10", "1,000", "120"]
    assert "all 8 " in describe_cost("judge", [], 8, None)


# -- local checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat") / "base", max_position_embeddings=128)


def opened(path: Path, batch_size: int = 4) -> LocalChat:
    return open_local_chat(locate("--judge", str(path), None), None, batch_size)


def test_answers_of_a_checkpoint_follow_from_their_seed_and_not_from_their_batch(checkpoint: Path) -> None:
    requests = [request(str(n), "how big" * (n % 3), temperature=0.7 * (n % 2), seed=n) for n in range(5)]
    keys = {r.key for r in requests}
    together = dict(opened(checkpoint).replies(requests, keys))
    one_by_one = dict(opened(checkpoint, batch_size=1).replies(requests, keys))
    assert together == one_by_one
    other_seed = [
        request(r.key, r.messages[1]["content"], temperature=r.temperature, seed=r.seed + 9) for r in requests
    ]
    again = dict(opened(checkpoint).replies(other_seed, keys))
    assert [again[r.key] == together[r.key] for r in requests] == [r.temperature == 0 for r in requests]


def test_greedy_answers_are_those_of_plain_generation(checkpoint: Path) -> None:
    asked = request("1", "how big is it?")
    ((_, reply),) = opened(checkpoint).replies([asked], {"1"})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("system: Judge.\nuser: how big is it?\nassistant: ", return_tensors="pt").input_ids[0].tolist()
    written: list[int] = []
    with torch.no_grad():
        while len(written) < 12 and (not written or written[-1] != 2):
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert reply.text == tokenizer.decode(written, skip_special_tokens=True).strip().rstrip("\ufffd").strip()
    assert reply.stop == ("stop" if written[-1] == 2 else LENGTH)


def test_draws_have_the_models_distribution(checkpoint: Path) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 4000
    draw = DrawPerRow([0.5] * draws, list(range(draws)), torch.device("cpu"))
    found = draw(torch.zeros(draws, 1, dtype=torch.long), logits.repeat(draws, 1)).argmax(-1)  # type: ignore[arg-type]
    wanted = torch.softmax(logits / 0.5, 0)
    shares = torch.bincount(found, minlength=4) / draws
    assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / draws).sqrt() + 1e-3).all()


def test_only_wanted_answers_come_from_the_same_batches(checkpoint: Path) -> None:
    requests = [request(str(number), "cups " * number, temperature=0.7, seed=number) for number in range(6)]
    whole = dict(opened(checkpoint, 3).replies(requests, {r.key for r in requests}))
    rest = dict(opened(checkpoint, 3).replies(requests, {"4", "5"}))
    assert rest == {key: whole[key] for key in ("4", "5")}


def test_a_full_context_gives_an_empty_answer_and_little_room_a_short_one(checkpoint: Path) -> None:
    chat = opened(checkpoint)
    lengths = {key: len(chat.encode(request(key, text))[0]) for key, text in (("a", "x"), ("b", "x" * 300))}
    assert lengths["b"] > 128
    near = "x" * (128 - 5 - lengths["a"] + 1)
    requests = [request("a", "x", max_tokens=30), request("b", "x" * 300), request("c", near, max_tokens=30)]
    replies = dict(chat.replies(requests, {"a", "b", "c"}))
    alone = dict(opened(checkpoint, 1).replies(requests, {"a"}))
    assert replies["b"] == Reply("", NO_ROOM)
    assert replies["a"] == alone["a"], "its neighbour with little room does not cut it short"
    assert replies["c"].stop in (LENGTH, "stop")
    with pytest.raises(UserError, match=r"^here: 1 of 3 prompts"):
        refuse_crowded(JudgeChoice(None, "here"), replies)


def test_a_template_without_system_messages_gets_the_text_in_the_users(tmp_path: Path) -> None:
    chat = opened(make_chat_checkpoint(tmp_path / "chat", template=NO_SYSTEM_TEMPLATE))
    ids, how = chat.encode(request("1", "how big"))
    assert chat.tokenizer.decode(ids) == "user: Judge.\n\nhow big\nassistant: "
    assert "without a system message" in how
    refusing = make_chat_checkpoint(tmp_path / "other", template="{{ raise_exception('never') }}")
    with pytest.raises(UserError, match=r"other: .* 2 messages: never; .*--chat-template"):
        opened(refusing).encode(request("1"))


def test_what_an_answer_spells_is_text_to_its_judge(checkpoint: Path) -> None:
    chat = opened(checkpoint)
    plain, _ = chat.encode(request("1", "red"))
    spelled, how = chat.encode(request("2", "red</s>"))
    end = chat.tokenizer.eos_token_id
    assert spelled.count(end) == plain.count(end) and how == ""
    assert "red</s>" in chat.tokenizer.decode(spelled)


def test_an_adapter_answers_on_its_base(checkpoint: Path, tmp_path: Path) -> None:
    adapter, merged = make_adapter(tmp_path / "adapter", checkpoint), tmp_path / "merged"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    model.merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (checkpoint / name).exists():
            (merged / name).write_bytes((checkpoint / name).read_bytes())
    asked = [request("1", "how big is it?")]
    texts = [dict(opened(path).replies(asked, {"1"}))["1"].text for path in (checkpoint, adapter, merged)]
    assert texts[1] == texts[2] != texts[0]


def test_a_checkpoint_without_a_template_needs_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--chat-template"):
        opened(make_checkpoint(tmp_path / "plain"))
    chat = open_local_chat(locate("--model", str(tmp_path / "plain"), None), "plain", 1)
    assert chat.tokenizer.decode(chat.encode(request("1", "hi"))[0]).endswith("User: hi\nAssistant:")
    with pytest.raises(UserError, match=r"--chat-template .*none\.jinja: "):
        open_local_chat(locate("--model", str(tmp_path / "plain"), None), str(tmp_path / "none.jinja"), 1)


def test_a_judge_whose_tokenizer_drops_text_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = locate("--judge", str(make_lossy_checkpoint(tmp_path / "lossy")), None)
    open_local_chat(model, "plain", 1)
    (line,) = [record.message for record in caplog.records]
    assert "lossy" in line and "LlamaTokenizer" in line and "& (1)" in line


def test_the_log_holds_how_the_judge_was_asked(tmp_path: Path) -> None:
    log = ReplyLog(tmp_path / "log.jsonl")
    log.add(request("1"), Reply("né\u2028x", "stop", "oddly", 3.0))
    assert ReplyLog(tmp_path / "log.jsonl").find(request("1")) == Reply("né\u2028x", "stop", "oddly", 3.0)
    assert json.loads((tmp_path / "log.jsonl").read_text())["how"] == "oddly"
