"""The attention-map loss against whole maps from eager attention, and what must not matter to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation import as_batch, assert_same, gradients, make_rows, step_loss
from peft import LoraConfig, get_peft_model
from pico import make_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kd.data.batches import model_inputs, predicting_positions
from kd.errors import UserError
from kd.losses.attention import AttentionInputs, QueryRows, attention_layers, attention_loss, head_groups, map_kl_sum
from kd.losses.layer_pairs import layer_pairs
from kd.losses.token_loss import TokenLoss
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.training.objective import Objective, Route, route_sums

# A window shorter than the rows, where a family has one, and longer than the padding: eager attention turns a position
# that sees nothing at all into NaN, which then spreads. GPT-2 has neither RoPE nor key heads of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6},
    "mixtral": {},
    "gpt2": {},
}


class Pair:
    """A trainable student and a frozen teacher, and the objective with the attention loss between them, in float64.

    (Mixtral's experts are multiplied in fp32 at most.)
    """

    def __init__(self, family: str = "llama", teacher: str | None = None, *, lora: bool = False, **config: Any) -> None:
        settings, dtype = FAMILIES[family], torch.float32 if family == "mixtral" else torch.float64
        self.student: nn.Module = make_model(family, dtype=dtype, **settings).train()
        self.teacher = make_model(teacher or family, seed=7, dtype=dtype, **{**settings, **config})
        self.teacher.requires_grad_(False)
        adapter = None
        if lora:
            adapter = STUDENT_ADAPTER
            lora_config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
            self.student = get_peft_model(self.student, lora_config, adapter, autocast_adapter_dtype=False).double()
            with torch.no_grad():
                for name, parameter in self.student.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0.0, 0.1)
        self.roles = (Role("student", self.student, adapter), Role("teacher", self.teacher, None))  # type: ignore[arg-type]

    def objective(self, pairs: Any = "even", weight: float = 0.5, token_weight: float = 1.0) -> Objective:
        depths = [role.model.config.num_hidden_layers for role in self.roles]
        term = attention_loss(weight, *self.roles, layer_pairs(pairs, *depths, "attention.layers"))
        route = Route("train", self.roles[1])
        return Objective((route,), TokenLoss(), terms=(term,), token_weight=token_weight)


def eager_maps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """[B, H, T, T] of every layer, as the model itself has them with eager attention."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    maps = base(**model_inputs(batch), output_attentions=True, use_cache=False).attentions
    base.set_attn_implementation(before)
    return maps  # type: ignore[no-any-return]


def defined_sum(pair: Pair, batch: dict[str, Tensor], pairs: list[tuple[int, int]]) -> Tensor:
    """KL(teacher's map || student's map), row by row and head by head, from whole maps."""
    with torch.no_grad():
        theirs = eager_maps(pair.teacher, batch)
    ours = eager_maps(pair.student, batch)
    total = torch.zeros((), dtype=torch.float64)
    for student_layer, teacher_layer in pairs:
        p, q = ours[student_layer], theirs[teacher_layer]
        groups = min(p.shape[1], q.shape[1])
        p, q = (m.reshape(len(m), groups, -1, *m.shape[2:]).mean(2) for m in (p, q))
        for b, t in predicting_positions(batch).nonzero().tolist():
            for g in range(groups):
                for s in range(t + 1):
                    if q[b, g, t, s] > 0:
                        total = total + q[b, g, t, s] * (q[b, g, t, s] / p[b, g, t, s]).log() / groups
    return total / len(pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_equal_eager_maps(family: str) -> None:
    pair, batch = Pair(family), as_batch(make_rows(3, shortest=9))
    expected = defined_sum(pair, batch, [(0, 0), (1, 1)])
    expected.backward()
    wanted = gradients(pair.student)
    sums = route_sums(pair.student, batch, pair.objective(weight=1.0, token_weight=0.0))
    sums.loss.sum().backward()
    # Eager attention puts its maps through an fp32 softmax in most architectures, whatever the weights are.
    torch.testing.assert_close(sums.terms[0][0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    ours = gradients(pair.student)
    assert_same({name: ours[name] for name in wanted}, wanted, 1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_it_is_added_to_the_token_loss_with_its_weight(lora: bool) -> None:
    pair, batch = Pair(lora=lora), as_batch(make_rows())
    plain = route_sums(pair.student, batch, Objective((Route("train", pair.roles[1]),), TokenLoss()))
    both = route_sums(pair.student, batch, pair.objective(weight=0.3))
    torch.testing.assert_close(both.loss, plain.loss + 0.3 * both.terms[0], rtol=1e-12, atol=0.0)
    assert both.terms[0] > 0 and plain.kl == both.kl


def test_only_chosen_layers_are_compared_also_where_depths_differ() -> None:
    pair, batch = Pair(num_hidden_layers=5), as_batch(make_rows(3, shortest=9))
    for chosen, pairs in (("even", [(0, 2), (1, 4)]), (((1, 3),), [(1, 3)])):
        sums = route_sums(pair.student, batch, pair.objective(chosen))
        torch.testing.assert_close(sums.terms[0][0], defined_sum(pair, batch, pairs).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("student_heads", "teacher_heads"), [(4, 8), (4, 2), (4, 1)])
def test_heads_are_averaged_in_groups_where_their_numbers_differ(student_heads: int, teacher_heads: int) -> None:
    pair = Pair(num_attention_heads=teacher_heads, num_key_value_heads=1, head_dim=4)
    assert pair.student.config.num_attention_heads == student_heads  # type: ignore[union-attr]
    batch = as_batch(make_rows(3, shortest=9))
    expected = defined_sum(pair, batch, [(0, 0), (1, 1)])
    expected.backward()
    wanted = gradients(pair.student)
    sums = route_sums(pair.student, batch, pair.objective(weight=1.0, token_weight=0.0))
    sums.loss.sum().backward()
    torch.testing.assert_close(sums.terms[0][0], expected.detach(), rtol=1e-5, atol=1e-5)
    ours = gradients(pair.student)
    assert_same({name: ours[name] for name in wanted}, wanted, 1e-5)


def test_unlike_windows_are_compared_over_the_keys_that_both_see(caplog: pytest.LogCaptureFixture) -> None:
    """A teacher whose map is cut to the student's window, and then made to sum to 1 again."""
    pair, batch = Pair("mistral", "qwen3", head_dim=8), as_batch(make_rows(3, shortest=9))
    ours, theirs = eager_maps(pair.student, batch), eager_maps(pair.teacher, batch)
    expected = torch.zeros((), dtype=torch.float64)
    for p, q in zip(ours, theirs, strict=True):
        for b, t in predicting_positions(batch).nonzero().tolist():
            seen = slice(max(0, t - 5), t + 1)
            cut = q[b, :, t, seen] / q[b, :, t, seen].sum(-1, keepdim=True)
            expected = expected + (cut * (cut / p[b, :, t, seen]).log()).sum() / 4 / 2
    term = route_sums(pair.student, batch, pair.objective()).terms[0][0]
    assert "layers 0-0, 1-1 (student's-teacher's) have unlike sliding windows" in caplog.text
    torch.testing.assert_close(term, expected.detach(), rtol=1e-5, atol=1e-5)


def random_inputs(seed: int, heads: int = 4, key_heads: int = 2, tokens: int = 12, **settings: Any) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, tokens, 3), (2, key_heads, tokens, 3))
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return AttentionInputs(query, key, **{"scaling": 0.7, **settings})


ROWS = [
    QueryRows(0, 0, torch.tensor([0, 3, 4, 9])),
    QueryRows(1, 2, torch.tensor([2, 5, 11])),
    QueryRows(1, 0, torch.tensor([], dtype=torch.long)),
]


def defined_map(inputs: AttentionInputs, row: int, head: int, start: int, t: int, window: int | None) -> Tensor:
    """What position t attends to from `start` on with one head: softmax of capped, scaled products of q and k."""
    _, heads, _, width = inputs.query_BHTC.shape
    query, scores = inputs.query_BHTC[row, head, t], []
    for s in range(start, t + 1):
        key = inputs.key_BKTC[row, head * inputs.key_BKTC.shape[1] // heads, s]
        score = inputs.scaling * sum((query[c] * key[c] for c in range(width)), torch.zeros((), dtype=torch.float64))
        score = score if inputs.softcap is None else inputs.softcap * (score / inputs.softcap).tanh()
        scores.append(score.exp() if window is None or t - s < window else torch.zeros_like(score))
    return torch.stack(scores) / sum(scores)


def defined_map_kl(student: AttentionInputs, teacher: AttentionInputs, rows: list[QueryRows]) -> Tensor:
    """KL(teacher's map || student's map) over the keys that both see; heads in equal, consecutive groups, averaged."""
    window = min((w for w in (student.window, teacher.window) if w is not None), default=None)
    numbers = [inputs.query_BHTC.shape[1] for inputs in (student, teacher)]
    total = torch.zeros((), dtype=torch.float64)
    for row, start, t in ((queries.row, queries.start, t) for queries in rows for t in queries.positions_n.tolist()):
        p_Ht, q_Ht = (
            torch.stack([defined_map(inputs, row, head, start, t, window) for head in range(heads)])
            for inputs, heads in zip((student, teacher), numbers, strict=True)
        )
        for p_g, q_g in zip(p_Ht.chunk(min(numbers)), q_Ht.chunk(min(numbers)), strict=True):
            p, q = p_g.mean(0), q_g.mean(0)
            seen = q > 0
            total = total + (q[seen] * (q[seen] / p[seen]).log()).sum() / min(numbers)
    return total


@pytest.mark.parametrize(
    ("heads", "teacher_heads", "window", "teacher_window", "softcap"),
    [(4, 4, None, None, None), (8, 4, 3, None, 1.5), (4, 8, 5, 3, None), (2, 8, None, 4, 2.0)],
)
def test_value_and_gradient_equal_the_definition_in_float64(
    heads: int, teacher_heads: int, window: int | None, teacher_window: int | None, softcap: float | None
) -> None:
    student = random_inputs(0, heads, window=window, softcap=softcap)
    teacher = random_inputs(1, teacher_heads, 1, window=teacher_window, scaling=0.4)
    inputs = [student.query_BHTC.requires_grad_(), student.key_BKTC.requires_grad_()]
    expected = defined_map_kl(student, teacher, ROWS)
    wanted = torch.autograd.grad(expected, inputs)
    found = map_kl_sum(student, teacher, ROWS, chunk_elements=70)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"softcap": 1.5}, {"heads": 8, "window": 3, "softcap": 1.5}])
def test_gradients_pass_gradcheck_and_chunks_do_not_matter(settings: dict[str, Any]) -> None:
    teacher = random_inputs(1)
    student = random_inputs(0, **settings)

    def value(query: Tensor, key: Tensor, chunk_elements: int = 70) -> Tensor:
        given = AttentionInputs(query, key, student.scaling, student.window, student.softcap)
        return map_kl_sum(given, teacher, ROWS, chunk_elements=chunk_elements)

    inputs = (student.query_BHTC.requires_grad_(), student.key_BKTC.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)
    results = []
    for chunk_elements in (1, 100, 10**6):
        loss = value(*inputs, chunk_elements)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_map_against_itself_costs_exactly_nothing(dtype: torch.dtype) -> None:
    given = random_inputs(0, window=3, softcap=1.5)
    query, key = (tensor.to(dtype).requires_grad_() for tensor in (given.query_BHTC, given.key_BKTC))
    ours = AttentionInputs(query, key, 0.7, 3, 1.5)
    loss = map_kl_sum(ours, AttentionInputs(query.detach(), key.detach(), 0.7, 3, 1.5), ROWS)
    loss.backward()
    assert loss == 0
    assert query.grad is not None and not query.grad.any()
    assert key.grad is not None and not key.grad.any()


def test_it_is_finite_however_far_apart_the_maps_are() -> None:
    """A key that the student all but ignores, one head of two, and a softmax that is 0 in fp32."""
    for heads in (2, 4):
        query, key = torch.zeros(1, heads, 3, 2), torch.zeros(1, 2, 3, 2)
        query[..., 0], key[:, :, 1, 0] = 300.0, 1.0
        theirs = AttentionInputs(query[:, :2], -key, 1.0)
        query.requires_grad_()
        loss = map_kl_sum(AttentionInputs(query, key, 1.0), theirs, [QueryRows(0, 0, torch.tensor([0, 1, 2]))])
        loss.backward()
        assert torch.isfinite(loss) and loss > 100
        assert query.grad is not None and torch.isfinite(query.grad).all()


def test_nothing_reaches_the_teacher_and_no_rows_give_a_connected_zero() -> None:
    student, teacher = random_inputs(0), random_inputs(1)
    for tensor in (student.query_BHTC, student.key_BKTC, teacher.query_BHTC, teacher.key_BKTC):
        tensor.requires_grad_()
    map_kl_sum(student, teacher, ROWS).backward()
    assert teacher.query_BHTC.grad is None and teacher.key_BKTC.grad is None
    student.query_BHTC.grad = None
    nothing = map_kl_sum(student, teacher, ROWS[2:])
    nothing.backward()
    assert nothing == 0 and student.query_BHTC.grad is not None and not student.query_BHTC.grad.any()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_packing_and_padding_do_not_matter(family: str) -> None:
    pair, rows = Pair(family), make_rows(shortest=9)
    objective = pair.objective(weight=1.0, token_weight=0.0)
    route_sums(pair.student, as_batch(rows), objective).loss.sum().backward()
    wanted = gradients(pair.student)
    padded = {k: v if k == "route_ids" else nn.functional.pad(v, (0, 1)) for k, v in as_batch(rows).items()}
    for batch in (as_batch(rows, packing=True), padded):
        sums = route_sums(pair.student, batch, objective)
        sums.loss.sum().backward()
        assert_same(gradients(pair.student), wanted, 1e-6)


def test_how_a_step_is_cut_into_micro_batches_does_not_matter() -> None:
    pair, rows = Pair(lora=True), make_rows(8)
    objective = pair.objective()
    results = []
    for size in (8, 4, 1):
        batches = [as_batch(rows[i : i + size]) for i in range(0, 8, size)]
        loss = step_loss(pair.student, batches, objective)
        results.append((loss, gradients(pair.student)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-10, atol=1e-12)
        assert_same(found, results[0][1])


@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(lora: bool) -> None:
    pair, batch = Pair(lora=lora), as_batch(make_rows())
    objective = pair.objective()
    route_sums(pair.student, batch, objective).loss.sum().backward()
    wanted = gradients(pair.student)
    model: Any = pair.student
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    route_sums(pair.student, batch, objective).loss.sum().backward()
    assert_same(gradients(pair.student), wanted, 0.0)


def test_models_keep_their_attention_and_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(module: nn.Module, *arguments: Any, **settings: Any) -> Any:
        calls.append(module)
        return sdpa(module, *arguments, **settings)

    pair, batch = Pair(), as_batch(make_rows())
    objective = pair.objective()
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", counted)
    route_sums(pair.student, batch, objective)
    assert len(calls) == 4 and ALL_ATTENTION_FUNCTIONS["sdpa"] is counted
    with pytest.raises(RuntimeError), objective.terms[0].recording(batch):
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted


def test_layers_are_paired_evenly_or_as_told() -> None:
    assert layer_pairs("even", 4, 4, "k") == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_pairs("even", 2, 6, "k") == ((0, 2), (1, 5))
    assert layer_pairs("even", 3, 5, "k") == ((0, 1), (1, 3), (2, 4))
    assert layer_pairs("even", 4, 2, "k") == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert layer_pairs(((1, 3), (0, 0)), 2, 4, "k") == ((1, 3), (0, 0))
    with pytest.raises(
        UserError, match=r"attention.layers: \[0, 4\]: the teacher has no layer 4; its layers are 0 to 3"
    ):
        layer_pairs(((0, 4),), 2, 4, "attention.layers")


def test_heads_that_do_not_group_are_refused_by_number() -> None:
    with pytest.raises(UserError, match="student has 4 attention heads and the teacher 6"):
        head_groups(4, 6)


def test_architectures_whose_maps_are_not_known_are_refused_by_name() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    sinks = AutoConfig.for_model("gpt_oss", **small, **experts, head_dim=8)
    with pytest.raises(UserError, match=r"GptOssAttention has attention sinks or biases \(s_aux\)"):
        attention_layers(Role("teacher", AutoModelForCausalLM.from_config(sinks), None))
    alibi = AutoConfig.for_model("bloom", vocab_size=32, hidden_size=16, n_layer=2, n_head=4)
    with pytest.raises(UserError, match="role teacher: BloomForCausalLM makes its attention maps in a way"):
        attention_layers(Role("teacher", AutoModelForCausalLM.from_config(alibi), None))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_that_only_the_mask_has_is_refused_by_name(attention: str) -> None:
    """Longer than the probe, which cannot see it; where it is not in use, or hides nothing, there is nothing to say."""
    experts = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2} | experts
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "shared_expert_intermediate_size": 16}
    sliding = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}

    def windows(family: str, **settings: Any) -> list[int | None]:
        config = AutoConfig.for_model(family, **small, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return [inputs.window for _, inputs in attention_layers(Role("teacher", model, None)).values()]

    words = r"role teacher: {} has a sliding window \(sliding_window: 12\) in layer {} without telling"
    with pytest.raises(UserError, match=words.format("Qwen2MoeForCausalLM", 1)):
        windows("qwen2_moe", sliding_window=12, **sliding)
    with pytest.raises(UserError, match=words.format("PhimoeForCausalLM", 0)):
        windows("phimoe", sliding_window=12)
    assert windows("qwen2_moe", sliding_window=12) == [None, None]
    assert windows("phimoe", sliding_window=64, max_position_embeddings=64) == [None, None]
    assert windows("afmoe", sliding_window=12, head_dim=8, layer_types=sliding["layer_types"]) == [None, 12]
    assert windows("qwen2", sliding_window=12, **sliding) == [None, 12]
