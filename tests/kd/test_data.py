"""Rows and response masks: against what templates are seen to render, and against lm-eval's own function."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from chat_tokenizers import (
    DROPS_REASONING,
    KEEPS,
    KINDS,
    MARKERS,
    NO_END,
    OPENS_REASONING,
    REFUSES_SYSTEM,
    SPACE_IN_HEADER,
    TRIMS,
    byte_level,
    chat,
    encoded,
    metaspace,
    real_template,
    responses,
    told_notes,
    with_template,
    words_only,
    wrapped,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import PLAIN_TEMPLATE, chat_format, load_tokenizer
from kd.data.drafts import (
    EMPTY_RESPONSE,
    EMPTY_TURNS,
    ENDLESS,
    EOS_APPENDED,
    NO_ASSISTANT,
    RESPONSE_NOT_FOUND,
    REWRITTEN,
    Dropped,
)
from kd.data.examples import NO_RESPONSE, PROMPT_TOO_LONG, encode_record, load_rows, marked_text, mask_from_offsets
from kd.data.stage_data import sampled_rows
from kd.data.token_rows import TokenRow, TokenRows
from kd.errors import UserError
from kd.models.checkpoint import checkpoint


@pytest.fixture(params=list(KINDS))
def tokenizer(request) -> PreTrainedTokenizerFast:
    return KINDS[request.param]


# -- conversations ----------------------------------------------------------------------------------------------------

# What the model writes before and after an assistant's content, under each template: read off the files.
REAL_TEMPLATES = {
    "alpaca": ("", "</s>"),
    "amberchat": (" ", "\n"),
    "chatml": ("", "<|im_end|>"),
    "chatqa": (" ", ""),
    "falcon-instruct": (" ", ""),
    "gemma-it": ("", "<end_of_turn>"),
    "granite-3.0-instruct": ("", "<|end_of_text|>"),
    "llama-2-chat": (" ", " </s>"),
    "llama-3-instruct": ("", "<|eot_id|>"),
    "mistral-instruct": (" ", "</s>"),
    "openchat-3.5": (" ", "<|end_of_turn|>"),
    "phi-3-small": ("", "<|end|>"),
    "phi-3": ("", "<|end|>"),
    "qwen2.5-instruct": ("", "<|im_end|>"),
    "saiga": ("", "</s>"),
    "solar-instruct": ("", "\n\n"),
    "vicuna": (" ", "</s>"),
    "zephyr": ("", "</s>"),
}
TRIM_NOT = {"granite-3.0-instruct", "openchat-3.5", "qwen2.5-instruct"}
TURNS = [
    "What is it?", " a red cup.\n\nYes: naïve 🙂 ", "And [/INST] then?\n", "### hello <b>", "Sure?", "日本語 ok",
]  # fmt: skip


def expected_responses(name: str, contents: list[str]) -> list[str]:
    before, after = REAL_TEMPLATES[name]
    wanted = []
    for content in contents[1::2]:
        written = content if name in TRIM_NOT else content.strip()
        if name == "falcon-instruct":
            written = written.replace("\n\n", "\n")
        wanted.append(before + written + after)
    if "<" not in after:
        wanted[-1] += "</s>"
    return wanted


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", list(REAL_TEMPLATES))
def test_masks_under_templates_of_known_models(shared, tokenizer, name, system):
    tokenizer = with_template(tokenizer, real_template(shared, name))
    row = encoded(chat(*TURNS, system=system), tokenizer)
    found, wanted = responses(row, tokenizer), expected_responses(name, TURNS)
    if tokenizer.convert_tokens_to_ids("▁") not in (None, tokenizer.unk_token_id):
        # Such a decoder drops spaces at edges: what remains has to be the same.
        found, wanted = (["".join(text.split()) for text in texts] for texts in (found, wanted))
    assert found == wanted
    rendered = tokenizer.apply_chat_template(chat(*TURNS, system=system)["messages"], tokenize=True)["input_ids"]
    assert row.input_ids == rendered + [tokenizer.eos_token_id] * ("<" not in REAL_TEMPLATES[name][1])


@pytest.mark.parametrize("name", list(REAL_TEMPLATES))
@pytest.mark.parametrize("which", ["mistral", "stories"])
def test_masks_with_real_tokenizers(shared, real_tokenizers, name, which):
    tokenizer = real_tokenizers[which]
    tokenizer.chat_template = real_template(shared, name)
    found = responses(encoded(chat(*TURNS), tokenizer), tokenizer)
    assert ["".join(text.split()) for text in found] == [
        "".join(text.split()) for text in expected_responses(name, TURNS)
    ]


@pytest.fixture(scope="module")
def real_tokenizers(shared):
    found = {
        "mistral": LlamaTokenizer.from_pretrained(shared / "tokenizers" / "mistral-v1", add_bos_token=True),
        "stories": AutoTokenizer.from_pretrained(shared / "models" / "stories260k"),
    }
    for tokenizer in found.values():
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    return found


@pytest.mark.parametrize("spaces", [" {} ", "{}\n", "\n\n{}", "{}"])
def test_template_that_trims(tokenizer, spaces):
    tokenizer = with_template(tokenizer, TRIMS)
    row = encoded(chat("Is it?", spaces.format("Yes."), "And?", spaces.format("No.")), tokenizer)
    assert responses(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_bos_is_there_exactly_if_the_template_writes_it():
    tokenizer = with_template(KINDS["metaspace"], TRIMS)
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id  # the tokenizer adds one to plain text
    assert encoded(chat("a", "b"), tokenizer).input_ids[:2].count(tokenizer.bos_token_id) == 1
    without = with_template(KINDS["metaspace"], TRIMS.replace("{{ bos_token }}", ""))
    assert tokenizer.bos_token_id not in encoded(chat("a", "b"), without).input_ids


def test_template_without_end_token(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, NO_END)
    record = chat("Is it?", "Yes.", "And?", "No.")
    assert responses(encoded(record, tokenizer), tokenizer) == [" Yes.\n", " No.\n</s>"]
    assert responses(encoded(record, tokenizer, append_eos=False), tokenizer) == [" Yes.\n", " No.\n"]
    assert told_notes(tmp_path / "a.jsonl", [record] * 3, tokenizer)[1].notes == [f"3 rows: {EOS_APPENDED}"]
    assert told_notes(tmp_path / "a.jsonl", [record], tokenizer, append_eos=False)[1].notes == [f"1 row: {ENDLESS}"]


def test_template_that_rewrites_earlier_turns_trains_the_last_one(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, DROPS_REASONING)
    thinking = chat("Is it?", "<think>hm</think>Yes.", "And?", "<think>so</think>No.")
    assert responses(encoded(thinking, tokenizer), tokenizer) == ["<think>so</think>No.<|im_end|>"]
    plain = chat("Is it?", "Yes.", "And?", "No.")
    assert responses(encoded(plain, tokenizer), tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    rows, report = told_notes(tmp_path / "a.jsonl", [thinking, plain], tokenizer)
    assert report.notes == [f"1 row: {REWRITTEN}"]
    assert len(rows) == 2


def test_question_that_is_no_beginning_of_the_answered_conversation(tokenizer):
    tokenizer = with_template(tokenizer, OPENS_REASONING)
    record = chat("Is it?", "<think>\nhm</think><think", "And?", "<tea>")
    assert responses(encoded(record, tokenizer), tokenizer) == ["<think<|im_end|>", "<tea><|im_end|>"]


def test_conversation_that_begins_with_the_assistant(tokenizer):
    tokenizer = with_template(tokenizer, TRIMS)
    record = {"messages": chat("Is it?", "Yes.")["messages"][::-1]}
    row = encoded(record, tokenizer)
    assert responses(row, tokenizer) == ["Yes.<|im_end|>"]
    assert "Is it?" not in tokenizer.decode(row.input_ids)  # nothing after the last response is kept


def test_first_end_token_ends_the_response():
    tokenizer = with_template(KINDS["byte-level"], SPACE_IN_HEADER)
    # The end token is the template's: one that a message spells is text.
    row = encoded(chat("Is it?", "Yes.</s>"), tokenizer)
    assert responses(row, tokenizer) == ["Yes.</s></s>"]
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    row = encoded(chat("say </s>", "Yes."), tokenizer)
    assert responses(row, tokenizer) == ["Yes.</s>"]
    assert row.input_ids.count(tokenizer.eos_token_id) == 1


def test_empty_assistant_turn_carries_loss_only_where_asked_for(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, TRIMS)
    record = chat("Is it?", " ", "And?", "No.")
    assert responses(encoded(record, tokenizer), tokenizer) == ["No.<|im_end|>"]
    assert responses(encoded(record, tokenizer, empty_responses="keep"), tokenizer) == ["<|im_end|>", "No.<|im_end|>"]
    assert told_notes(tmp_path / "a.jsonl", [record], tokenizer)[1].notes == [f"1 row: {EMPTY_TURNS}"]
    # What comes after the last turn with loss is left away, as messages after it always were.
    assert encoded(chat("Is it?", "Yes.", "And?", ""), tokenizer) == encoded(chat("Is it?", "Yes."), tokenizer)
    assert encode_record(chat("Is it?", "\n"), tokenizer, DataRecipe(), "r:1") == Dropped(EMPTY_RESPONSE)
    tokenizer = with_template(tokenizer, NO_END)
    kept = encoded(chat("Is it?", ""), tokenizer, empty_responses="keep")
    assert responses(kept, tokenizer)[0].strip() == "</s>"


def test_end_token_that_is_also_padding_is_a_response_token():
    tokenizer = with_template(KINDS["byte-level"], SPACE_IN_HEADER)
    tokenizer.pad_token = tokenizer.eos_token
    row = encoded(chat("Is it?", "Yes."), tokenizer)
    assert row.input_ids[-1] == tokenizer.pad_token_id
    assert row.response_mask[-1]


def test_end_token_that_swallows_the_line_end_after_it():
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [AddedToken("<|fin|>", special=True, rstrip=True), AddedToken("<|a|>", special=True, rstrip=True)]
    )
    template = "{% for m in messages %}{{ '<|a|>\n' + m['content'] + '<|fin|>\n' }}{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ '<|a|>\n' }}{% endif %}"
    row = encoded(chat("Is it?", "Yes.", "And?", "No."), tokenizer)
    kept = [
        tokenizer.decode([i]) for i, is_response in zip(row.input_ids, row.response_mask, strict=True) if is_response
    ]
    assert "".join(kept) == "Yes.<|fin|>No.<|fin|>"


@pytest.mark.parametrize("trim_offsets", [None, True, False])
def test_white_space_at_the_edge_of_a_response(trim_offsets):
    # " hello" is one token, and its space stands in the header: without the rule the first word would never be learnt.
    tokenizer = with_template(byte_level(trim_offsets), SPACE_IN_HEADER)
    row = encoded(chat("a", "hello world"), tokenizer)
    assert responses(row, tokenizer) == [" hello world</s>"]
    # Spaces that are tokens of their own stay where they begin.
    row = encoded(chat("a", "   hello"), tokenizer)
    assert responses(row, tokenizer)[0].lstrip() == "hello</s>"
    assert len(responses(row, tokenizer)[0]) == len("   hello</s>")


def test_merges_across_the_edges_of_a_response():
    text = "A:\n\nyes.\n\nUser"
    # tokens:  A:|\n\n|yes|.\n\nU|ser      response: the second \n up to and with the full stop
    offsets = [(0, 2), (2, 4), (4, 7), (7, 11), (11, 14)]
    assert mask_from_offsets(text, [(3, 8)], offsets).tolist() == [False, False, True, True, False]
    # A token of spaces, shrunk to nothing behind them, begins where the one before it ends.
    assert mask_from_offsets("A: yes", [(3, 6)], [(0, 2), (3, 3), (3, 6)]).tolist() == [False, False, True]
    assert mask_from_offsets("A: yes", [(2, 6)], [(0, 2), (3, 3), (3, 6)]).tolist() == [False, True, True]
    # A word whose first letters are the header's is the header's; the bytes of one character share its place.
    assert mask_from_offsets("Ayes", [(1, 4)], [(0, 2), (2, 4)]).tolist() == [False, True]
    assert mask_from_offsets("A🙂", [(1, 2)], [(0, 1), (1, 2), (1, 2)]).tolist() == [False, True, True]


def test_tokenizer_that_drops_white_space():
    tokenizer = words_only()
    tokenizer.chat_template = SPACE_IN_HEADER.replace("+ (eos_token", "+ (' ' + eos_token")
    row = encoded(chat("red?", "yes yes"), tokenizer)
    assert responses(row, tokenizer) == [" yes yes </s>"]


def test_tokenizer_without_offsets(tmp_path):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = SPACE_IN_HEADER
    row = encoded(chat("red 🙂?", "yes", "so?", "naïve"), tokenizer)
    assert responses(row, tokenizer) == ["yes</s>", "naïve</s>"]


def test_prompt_and_completion_as_messages_train_the_completion_only(tokenizer):
    tokenizer = with_template(tokenizer, TRIMS)
    messages = chat("Is it?", "Yes.", "And?", "No.")["messages"]
    row = encoded({"prompt": messages[:3], "completion": messages[3:]}, tokenizer)
    assert row.input_ids == encoded({"messages": messages}, tokenizer).input_ids
    assert responses(row, tokenizer) == ["No.<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from(" \n\taé.🙂日<|>s"), max_size=12), min_size=2, max_size=6), st.booleans())
@example([" ", "\n\na ", "\n", ""], True)
def test_masks_of_any_contents_are_the_rendered_contents(contents, trims):
    contents = contents[: len(contents) // 2 * 2]
    tokenizer = with_template(KINDS["byte-level"], TRIMS if trims else KEEPS)
    row = encoded(chat(*contents), tokenizer, empty_responses="keep")
    wanted = [(text.strip() if trims else text) + "<|im_end|>" for text in contents[1::2]]
    found = responses(row, tokenizer)
    if trims:
        assert found == wanted
    else:  # line ends at the start of a content may merge with the header's
        assert [text.lstrip() for text in found] == [text.lstrip() for text in wanted]


def test_plain_template_is_for_tokenizers_without_one_and_is_saved_with_them(tmp_path, caplog):
    KINDS["metaspace"].save_pretrained(tmp_path)
    tokenizer = load_tokenizer(checkpoint(tmp_path), DataRecipe(chat_template="plain"))
    row = encoded(chat("Is it?", " Yes. ", "And?", "No.", system="Hm"), tokenizer)
    assert responses(row, tokenizer) == [" Yes.</s>", " No.</s>"]
    assert tokenizer.decode(row.input_ids).count("<s>") == 1
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(checkpoint(tmp_path), DataRecipe()).chat_template == PLAIN_TEMPLATE
    assert not caplog.records
    (tmp_path / "mine.jinja").write_text(TRIMS)
    settings = DataRecipe(chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(checkpoint(tmp_path), settings).chat_template == PLAIN_TEMPLATE
    assert "mine.jinja is not used" in caplog.text


def test_end_tokens_are_seen_in_what_the_template_renders():
    tokenizer = KINDS["byte-level"]
    assert chat_format(tokenizer, TRIMS).end_tokens == ("</s>", "<|im_end|>")
    assert chat_format(tokenizer, NO_END).end_tokens == ("</s>",)
    # A marker that is no special token of this tokenizer does not end anything.
    assert chat_format(tokenizer, TRIMS.replace("im_end", "stop")).end_tokens == ("</s>",)


# -- pairs and texts --------------------------------------------------------------------------------------------------


def lm_eval_encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM.__new__(HFLM)
    model.tokenizer, model.backend = tokenizer, "causal"
    model.add_bos_token = model.custom_prefix_token_id = None
    return model._encode_pair(prompt, completion)


def assert_as_lm_eval(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> bool:
    """Whether also the prompt's tokens are lm-eval's: all but where a token crosses the boundary."""
    context, continuation = lm_eval_encode_pair(tokenizer, prompt, completion)
    as_given = DataRecipe(append_eos=False, empty_responses="keep")
    row = encode_record({"prompt": prompt, "completion": completion}, tokenizer, as_given, "r:1")
    begins_with_bos = prompt.startswith("<s>")
    joint = tokenizer(prompt + completion, add_special_tokens=not begins_with_bos)["input_ids"]
    wanted = [i >= max(len(context), 1) for i in range(len(joint))]
    if not any(wanted):
        assert row == Dropped(NO_RESPONSE)
        return False
    assert row == TokenRow(joint, wanted)
    assert joint[len(context) :] == continuation
    return joint == context + continuation


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(st.sampled_from(" \n\tare.🙂"), min_size=1, max_size=9),
    completion=st.text(st.sampled_from(" \nare🙂")),
)
@example(prompt="<s>Question: red", completion=" cup")
@example(prompt=" \n ", completion="cup")
@example(prompt="Answer:", completion=" a red cup")
@example(prompt="Ans", completion="wer")
def test_pairs_are_cut_as_lm_eval_cuts_them(kind, prompt, completion):
    assert_as_lm_eval(KINDS[kind], prompt, completion)


@pytest.mark.parametrize("which", ["mistral", "stories"])
def test_real_pairs_are_cut_as_lm_eval_cuts_them(shared, real_tokenizers, which):
    differ = 0
    for line in (shared / "data" / "ecom" / "heldout_epqa.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        pair = json.loads(line)
        assert assert_as_lm_eval(real_tokenizers[which], pair["prompt"], pair["completion"])
        assert assert_as_lm_eval(real_tokenizers[which], pair["prompt"] + " ", pair["completion"][1:])
        apart = [
            real_tokenizers[which](pair[name], add_special_tokens=False)["input_ids"]
            for name in ("prompt", "completion")
        ]
        joint = real_tokenizers[which](pair["prompt"] + pair["completion"], add_special_tokens=False)["input_ids"]
        differ += joint != apart[0] + apart[1]
    assert differ > 0 or which == "mistral"  # where it is, the test tells the two ways apart


def test_pair_gets_one_end_token_and_its_bos(tokenizer):
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for completion in (" Yes.", " Yes.</s>"):
        row = encoded({"prompt": "Is it?", "completion": completion}, tokenizer)
        assert responses(row, tokenizer) == [" Yes.</s>"]
        assert row.input_ids.count(tokenizer.bos_token_id) == adds_bos
    row = encoded({"prompt": "<s>Is it?", "completion": " Yes."}, tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    row = encoded({"prompt": "Is it?", "completion": " Yes."}, tokenizer, append_eos=False)
    assert responses(row, tokenizer) == [" Yes."]
    empty = {"prompt": "Is it?", "completion": ""}
    assert responses(encoded(empty, tokenizer, empty_responses="keep"), tokenizer) == ["</s>"]
    assert encode_record(empty, tokenizer, DataRecipe(), "r:1") == Dropped(EMPTY_RESPONSE)


def test_pair_without_a_prompt_has_bos_as_its_context(tokenizer):
    row = encoded({"prompt": "", "completion": "Yes."}, tokenizer)
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.input_ids[1:] == tokenizer("Yes.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert row.response_mask == [False] + [True] * (len(row.input_ids) - 1)


def test_bos_that_is_also_eos_is_not_taken_off_an_empty_prompt():
    tokenizer = wrapped(metaspace().backend_tokenizer)
    tokenizer.eos_token = tokenizer.bos_token
    row = encoded({"prompt": " ", "completion": "Yes."}, tokenizer, append_eos=False)
    assert row.input_ids == tokenizer(" Yes.")["input_ids"]
    assert row.response_mask == [False] + [True] * (len(row.input_ids) - 1)
    prompt_only = {"prompt": "\n", "completion": ""}
    row = encoded(prompt_only, tokenizer, append_eos=False, empty_responses="keep")
    assert row.input_ids == tokenizer("\n")["input_ids"]


def test_end_token_that_the_tokenizer_adds_is_not_counted_to_the_prompt():
    tokenizer = metaspace()
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    row = encoded({"prompt": "Is it?", "completion": " Yes."}, tokenizer)
    assert row == encoded({"prompt": "Is it?", "completion": " Yes."}, metaspace())
    assert encoded({"text": "Is it?"}, tokenizer).input_ids[-1] != tokenizer.eos_token_id


def test_text_is_all_response_but_bos(tokenizer):
    row = encoded({"text": "hello world"}, tokenizer)
    assert row.input_ids == tokenizer("hello world")["input_ids"]
    assert row.response_mask == [False] + [True] * (len(row.input_ids) - 1)
    row = encoded({"text": "hello world"}, tokenizer, append_eos=True)
    assert row.input_ids == [*tokenizer("hello world")["input_ids"], tokenizer.eos_token_id]
    assert row.response_mask[-1]
    assert encode_record({"text": ""}, tokenizer, DataRecipe(), "r:1") == Dropped(NO_RESPONSE)


# -- truncation, dropping, storage ----------------------------------------------------------------------------------


def test_truncated_response_has_no_end_token(tokenizer):
    record = {"prompt": "Is it?", "completion": " Yes, a red cup."}
    whole = encoded(record, tokenizer)
    for length in range(2, len(whole.input_ids) + 1):
        row = encode_record(record, tokenizer, DataRecipe(max_length=length), "r:1")
        if length <= whole.response_mask.index(True):
            assert row == Dropped(PROMPT_TOO_LONG)
        else:
            assert row == TokenRow(whole.input_ids[:length], whole.response_mask[:length])
            assert (row.input_ids[-1] == tokenizer.eos_token_id) == (length == len(whole.input_ids))


def test_truncated_conversation_keeps_the_responses_that_fit(tokenizer):
    tokenizer = with_template(tokenizer, TRIMS)
    record = chat("Is it?", "Yes.", "And?", "No.")
    whole = encoded(record, tokenizer)
    first = whole.response_mask.index(True)
    assert encode_record(record, tokenizer, DataRecipe(max_length=first), "r:1") == Dropped(PROMPT_TOO_LONG)
    row = encoded(record, tokenizer, max_length=len(whole.input_ids) - 5)
    assert row == TokenRow(whole.input_ids[:-5], whole.response_mask[:-5])


def test_report_counts_every_record(tmp_path):
    tokenizer = with_template(KINDS["byte-level"], TRIMS)
    rows, report = told_notes(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "Is it?", "completion": " Yes."},
            {"prompt": "Is it?" * 40, "completion": " Yes."},
            {"prompt": "Is it?", "completion": " Yes." * 40},
            {"messages": [{"role": "user", "content": "hello"}]},
            {"text": ""},
            chat("Is it?", "Yes."),
        ],
        tokenizer,
        max_length=60,
    )
    assert (report.records, report.kept, report.truncated) == (6, 3, 1)
    assert report.dropped == {PROMPT_TOO_LONG: 1, NO_ASSISTANT: 1, NO_RESPONSE: 1}
    assert len(rows) == 3
    assert report.tokens == rows.lengths.sum() == sum(len(rows[i].input_ids) for i in range(3))
    assert report.response_tokens == rows.response_counts.sum() == sum(sum(rows[i].response_mask) for i in range(3))
    assert rows.lengths.tolist()[1] == 60


def test_batches_give_what_single_records_give(tmp_path, tokenizer):
    tokenizer = with_template(tokenizer, TRIMS)
    records = [
        {"prompt": "Is it?", "completion": " Yes."},
        chat("Is it?", "Yes.", "And?", "naïve 🙂"),
        {"text": "hello world"},
        {"prompt": "", "completion": "Yes."},
        {"prompt": "<s>a ", "completion": "b"},
    ] * 300  # more than one batch
    rows, _ = told_notes(tmp_path / "rows.jsonl", records, tokenizer)
    assert len(rows) == len(records)
    single = [encoded(record, tokenizer) for record in records[:5]]
    assert all(rows[i] == single[i % 5] for i in range(len(records)))


def test_source_of_which_nothing_is_left_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Is it so?", "completion": "Yes."}\n' * 3)
    with pytest.raises(UserError, match=rf"{path}: none of its 3 rows .*3 x {PROMPT_TOO_LONG}.*data\.max_length \(3\)"):
        load_rows([SourceRecipe(path=str(path))], KINDS["byte-level"], DataRecipe(max_length=3))


def test_token_rows():
    rows = TokenRows.from_rows([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])])
    assert (rows.input_ids.dtype, rows.response_mask.dtype, rows.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert (rows.lengths.tolist(), rows.response_counts.tolist()) == ([3, 2], [2, 1])
    assert rows[1] == TokenRow([4, 5], [False, True])
    both = TokenRows.concatenate([rows, TokenRows.from_rows([]), rows])
    assert [both[i] for i in range(len(both))] == [rows[0], rows[1]] * 2
    with pytest.raises(IndexError):
        rows[2]
    assert len(list(rows)) == 2


def test_marked_text_is_the_decoded_row_in_pieces(tokenizer):
    tokenizer = with_template(tokenizer, NO_END)
    row = encoded(chat("Is it?", "Yes.", "And?", "naïve 🙂"), tokenizer)
    segments = marked_text(row, tokenizer)
    assert "".join(text for text, _ in segments) == tokenizer.decode(row.input_ids)
    assert [text for text, is_response in segments if is_response] == [" Yes.\n", " naïve 🙂\n</s>"]


def test_marked_text_shows_a_character_once_whose_bytes_are_in_two_segments():
    tokenizer = KINDS["byte-level"]
    ids = tokenizer("a🙂b")["input_ids"]
    cut = 3
    row = TokenRow(ids, [i >= cut for i in range(len(ids))])
    assert marked_text(row, tokenizer) == [("a", False), ("🙂b", True)]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        (
            REFUSES_SYSTEM,
            chat("a", "b", system="c"),
            r"rows\.jsonl:7: the chat template refuses.*System role not supported",
        ),
        (
            "{{ raise_exception('alternate!') if messages[0]['role'] != 'user' }}" + TRIMS,
            {"messages": chat("a", "b")["messages"][::-1]},
            r"rows\.jsonl:7: .*alternate!.*assistant, user",
        ),
        ("{% if %}", chat("a", "b"), "its chat template, line 1"),
        ("{{ messages[0]['missing'] + 'a' }}", chat("a", "b"), r"rows\.jsonl:7: the chat template refuses"),
        (None, chat("a", "b"), r"rows\.jsonl:7: .*no chat template; set data\.chat_template"),
    ],
)
def test_conversations_that_cannot_be_rendered(template, record, words):
    tokenizer = with_template(KINDS["byte-level"], template)
    with pytest.raises(UserError, match=words):
        encode_record(record, tokenizer, DataRecipe(), "rows.jsonl:7")


def test_response_that_cannot_be_told_from_the_rest_is_dropped():
    header_by_content = (
        "{{ 'x' if add_generation_prompt else messages[-1]['content'] | length ~ messages[0]['content'] ~ "
        "messages[-1]['content'] }}"
    )
    tokenizer = with_template(KINDS["byte-level"], header_by_content)
    assert encode_record(chat("a", "bcd"), tokenizer, DataRecipe(), "r:1") == Dropped(RESPONSE_NOT_FOUND)


def test_fallback_template_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"data\.chat_template: nowhere\.jinja: unreadable"):
        encode_record(chat("a", "b"), KINDS["byte-level"], DataRecipe(chat_template="nowhere.jinja"), "r:1")
    with pytest.raises(UserError, match="no tokenizer that transformers can open"):
        load_tokenizer(checkpoint(tmp_path), DataRecipe())


def test_tokenizer_without_an_end_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte-level"].backend_tokenizer)
    tokenizer.chat_template = NO_END
    for record in ({"prompt": "a", "completion": " b"}, chat("a", "b")):
        with pytest.raises(UserError, match=r"rows\.jsonl:7: .*append_eos: false"):
            encode_record(record, tokenizer, DataRecipe(), "rows.jsonl:7")
        encoded(record, tokenizer, append_eos=False)


def test_normalizers_that_change_lengths_do_not_move_the_mask():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKD()
    tokenizer.chat_template = TRIMS
    assert responses(encoded(chat("ﬁ é", "ﬁ é", "é", "x"), tokenizer), tokenizer) == [
        unicodedata.normalize("NFKD", "fi é<|im_end|>"),
        "x<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("rows", "length", "sampled"),
    [(1000, 20, 63), (40, 20, 40), (1000, 256, 16), (1000, 4000, 8), (5, 4000, 5)],
)
def test_what_is_measured_before_the_first_step_has_few_rows_and_few_tokens(
    rows: int, length: int, sampled: int
) -> None:
    """Rows over the whole file: it may be sorted."""
    row = ([1] * length, [False] + [True] * (length - 1))
    chosen = sampled_rows(TokenRows.from_rows([row] * rows))
    assert len(chosen) == sampled
    assert chosen[0] == 0
    assert chosen[-1] >= 0.8 * (rows - 1)
