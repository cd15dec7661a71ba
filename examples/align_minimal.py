"""Domain Alignment from Expert (arXiv 2406.19112) in one loop of plain torch, transformers and peft.

A student learns from two teachers. On rows of the route "domain" it matches the expert's next-token distribution, on
rows of the route "general" that of the frozen reference. N_r counts the response tokens of route r in one step:

    loss = mean over routes r of  1 / N_r * sum over response tokens t of r of  KL( p_teacher(r) || p_student )_t

All three roles share one copy of the base model's weights: the student is a trainable LoRA adapter, the expert is a
frozen LoRA adapter, and the reference is the base with adapters off.

    python examples/align_minimal.py --base B --expert E --domain-data D --general-data G --output O

Rows are JSON lines with "prompt" and "completion" as text. `dae align` gives the same losses on the same rows; it also
resumes, evaluates, checks its inputs, and needs no N x vocabulary logits.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

Row = dict[str, str]
Step = dict[str, list[Row]]  # route -> its rows of one optimizer step


def train(
    base: str,
    expert: str,
    steps: list[Step],
    output: str,
    *,
    learning_rate: float = 2e-4,
    rank: int = 16,
    alpha: float = 32,
    max_length: int = 2048,
    seed: int = 0,
) -> list[float]:
    """Train the student, save its adapter in `output`, and return the loss of every step."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
    model = get_peft_model(model, lora).eval()  # the student is the adapter "default"; no dropout anywhere
    model.load_adapter(expert, "expert")
    student = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(student, learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * len(steps)), len(steps))

    losses = []
    for number, step in enumerate(steps, 1):
        loss = 0.0
        for route, rows in step.items():
            inputs, predicts_response_BT = batch_of(rows, tokenizer, max_length, device)
            teacher_logits_NV = logits_of_teacher(model, route, inputs)[predicts_response_BT]
            logits_NV = model(**inputs).logits[predicts_response_BT]
            route_loss = forward_kl(teacher_logits_NV, logits_NV).mean() / len(step)
            route_loss.backward()
            loss += route_loss.item()
        torch.nn.utils.clip_grad_norm_(student, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss)
        print(f"step {number}/{len(steps)}  loss {loss:.4f}")
    model.save_pretrained(output, selected_adapters=["default"])
    tokenizer.save_pretrained(output)
    return losses


def logits_of_teacher(model: PeftModel, route: str, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, V] logits of the route's teacher, without gradient. The student is active again afterwards."""
    with torch.no_grad():
        if route == "general":
            with model.disable_adapter():
                return model(**inputs).logits
        model.set_adapter("expert", inference_mode=True)
        logits_BTV = model(**inputs).logits
    model.set_adapter("default")
    return logits_BTV


def forward_kl(teacher_logits_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """[N] KL(teacher || student) of each response token, in nats."""
    log_q_NV, log_p_NV = teacher_logits_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)


def batch_of(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs [B, T], and which positions predict a response token (completion or end token), [B, T] bool."""
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    prompts = [tokenizer(row["prompt"].rstrip())["input_ids"] for row in rows]
    input_ids_BT = pad_sequence([torch.tensor(one[:max_length]) for one in ids], batch_first=True).to(device)
    length_B1 = torch.tensor([[min(len(one), max_length)] for one in ids], device=device)
    prompt_B1 = torch.tensor([[max(len(one), 1)] for one in prompts], device=device)
    t_T = torch.arange(input_ids_BT.shape[1], device=device)
    inputs = {"input_ids": input_ids_BT, "attention_mask": (t_T < length_B1).long()}
    return inputs, (t_T >= prompt_B1 - 1) & (t_T < length_B1 - 1)  # position t predicts token t + 1


def mixed(rows: Step, share: float, rows_per_step: int, count: int, seed: int) -> list[Step]:
    """`count` steps in which `share` of all rows are domain rows; each file is shuffled anew when it is used up."""
    pick = random.Random(seed)
    streams = {route: shuffled(of_route, pick) for route, of_route in rows.items()}
    is_domain = (int((k + 1) * share) > int(k * share) for k in itertools.count())
    steps: list[Step] = []
    for _ in range(count):
        step: Step = {}
        for domain in itertools.islice(is_domain, rows_per_step):
            route = "domain" if domain else "general"
            step.setdefault(route, []).append(next(streams[route]))
        steps.append(step)
    return steps


def shuffled(rows: list[Row], pick: random.Random) -> Iterator[Row]:
    while True:
        yield from pick.sample(rows, len(rows))


def read_rows(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Domain Alignment from Expert, the minimal way.")
    for name in ("base", "expert", "domain-data", "general-data", "output"):
        parser.add_argument(f"--{name}", required=True)
    settings = {"steps": 100, "rows-per-step": 8, "domain-share": 0.1, "learning-rate": 2e-4, "seed": 0}
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    rows = {"general": read_rows(args.general_data), "domain": read_rows(args.domain_data)}
    steps = mixed(rows, args.domain_share, args.rows_per_step, args.steps, args.seed)
    train(args.base, args.expert, steps, args.output, learning_rate=args.learning_rate, seed=args.seed)


if __name__ == "__main__":
    main()
