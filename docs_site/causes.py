"""Causes that a message does not name itself, by a part of the message; a test holds each part to the code."""

from __future__ import annotations

CAUSES: dict[str, str] = {
    "truncated or invalid safetensors": "A copy or download stopped early, or the disk was full while the file was "
    "written.",
    "bytes where its header says": "A copy or download stopped early, or the disk was full while the file was written.",
    "its weights do not match its": "Files are missing, or config.json belongs to another checkpoint.",
    "its weights are pickled": "Older checkpoints hold pytorch_model.bin instead of safetensors.",
    "its tokenizer differs from that of": "The models are of different families, or tokens were added to one of them.",
    "was trained on another base": "An adapter holds differences to its base; on another base they mean something "
    "else.",
    "was begun with init_lora_weights": "Such an adapter holds differences to changed weights; on the plain base its "
    "outputs are wrong.",
    "this run has not finished": "The run was stopped, or is still running.",
    "the hub does not give a model of this name": "A misspelt id, no network, or a gated model without a login.",
    "transforms its logits in an unknown way": "The loss forms logits from hidden states; this model's own logits are "
    "another function of them.",
    "see each other when packed": "The model ignores where one packed row ends and the next begins.",
    "has no chat template": "Base models often come without a chat template.",
    "does not render it": "Many templates ignore tools, calls or thoughts.",
    "rows has a response token": "Answers are empty, or prompts fill data.max_length.",
    "the shares sum to": "Shares are of all rows of all routes: every source has one, or none has.",
    "half of a surrogate pair": "The text was cut inside a character, often an emoji.",
    "together are ambiguous": "The row has the keys of two formats.",
    "stopped before step": "Mostly a learning rate that is too high, too short a warm-up, or damaged rows.",
    "was started with different settings": "The folder holds a run of another recipe, or an input has changed: rows, "
    "checkpoint, tokenizer or chat template.",
    "held by a live process": "Another process writes to this folder, often the same command in another terminal.",
    "holds files that this command did not write": "A command writes only into a folder that is new, empty or its own.",
    "no longer answers as when": "Another model, or another version of it, is served under this name.",
    "answers without `prompt_logprobs`": "The server does not return log-probabilities of the tokens that it is sent.",
    "rate limit (429)": "The server takes fewer requests a minute than were sent.",
    "cannot be compared, they differ in": "The models were evaluated with different tasks, settings or versions.",
    "are missing, and several processes": "Only one process fills a cache; several read it.",
}
