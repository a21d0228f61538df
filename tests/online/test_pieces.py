"""Models that FSDP2 cuts over two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from meeting import meeting
from transformers import LlamaConfig, LlamaForCausalLM

from fastdaa.online.pieces import check_pieces

SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from fastdaa.online.config import OnlineConfig
from fastdaa.online.models import prepare_models
from fastdaa.online.packs import packs_of_process
from fastdaa.online.pieces import load_state, whole, whole_state
from fastdaa.online.scoring import score_tokens, score_values

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, options = dist.get_rank(), json.loads(sys.argv[1])
sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
torch.manual_seed(0)
policy = LlamaForCausalLM(LlamaConfig(
    vocab_size=24, intermediate_size=32, tie_word_embeddings=True, initializer_range=0.5, **sizes
))
before = {name: weight.clone() for name, weight in policy.state_dict().items()}
config = OnlineConfig(output_dir=None, disable_tqdm=True, fsdp=True, **options)
models = prepare_models(policy, None, None, config, 4)

def local(*modules):
    weights = {id(w): w for module in modules for w in module.parameters()}
    mine = sum(weight.to_local().numel() for weight in weights.values())
    return [mine, sum(weight.numel() for weight in weights.values())]

found = {"pieces": local(models.policy, models.reference, models.critic)}
prompts, answers = ([torch.arange(n) for n in lengths] for lengths in ([3, 2, 4], [2, 4, 3]))
# Of one pack each, the first process has two and the other one.
packs = packs_of_process(
    prompts, answers, device=torch.device("cpu"), in_step=True, tokens_per_pack=1
)
found["counted"] = [pack.get("counted", True) for _, pack in packs]
lengths = torch.tensor([len(ids) for ids in answers])
models.train(False)
with torch.no_grad():
    for weight in models.critic.head.parameters():
        weight.to_local().fill_(0.1)
with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
    scores = [score_tokens(model, packs, lengths).logps for model in models[:2]]
    found["values"] = score_values(models.critic, packs, lengths).tolist()
found["same"] = torch.equal(*scores)
found["logps"] = scores[0].tolist()
ids = torch.arange(5)[None]
with whole(models.policy), torch.no_grad():
    if rank == 0:
        found["logits"] = models.policy(input_ids=ids).logits.double().tolist()
found["pieces_again"] = local(models.policy, models.reference, models.critic)
state = whole_state(models.policy)
found["state"] = all(torch.equal(state[name], before[name]) for name in before) if state else None
found["names"] = len(state)
with torch.no_grad():
    for weight in models.policy.parameters():
        weight.mul_(0.0)
saved = {name: weight for name, weight in before.items() if name != "lm_head.weight"}
path = f"{sys.argv[2]}/{rank}.safetensors"
save_file(saved, path)
load_state(models.policy, path)
with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
    found["loaded"] = torch.equal(score_tokens(models.policy, packs, lengths).logps, scores[0])
del saved["model.norm.weight"]
save_file(saved, path)
try:
    load_state(models.policy, path)
except ValueError as error:
    found["error"] = str(error)
if rank == 0:
    whole_model = LlamaForCausalLM(policy.config)
    whole_model.load_state_dict(before)
    rows = []
    with torch.no_grad():
        found["expected"] = whole_model(input_ids=ids).logits.double().tolist()
        for asked, answer in zip(prompts, answers):
            logps = whole_model(input_ids=torch.cat([asked, answer])[None]).logits.log_softmax(-1)
            rows.append(logps[0, len(asked) - 1 : -1].gather(1, answer[:, None])[:, 0])
        found["expected_logps"] = torch.cat(rows).tolist()
print(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def run_two(folder, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **meeting(2)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(options), str(folder)],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_every_process_has_its_pieces(tmp_path):
    first, second = run_two(tmp_path)
    (mine, all_of), (its, _) = first["pieces"], second["pieces"]
    assert mine + its == all_of and abs(mine - its) < 0.05 * all_of
    assert first["pieces_again"] == first["pieces"]
    assert first["counted"] == [True, True] and second["counted"] == [True, False]
    for name in ("logps", "values"):
        assert first[name] == second[name] and len(first[name]) == 9
    assert first["same"] and len({*first["values"]}) > 1
    assert first["logps"] == pytest.approx(first["expected_logps"], abs=1e-5)
    torch.testing.assert_close(first["logits"], first["expected"], atol=1e-5, rtol=1e-5)
    assert first["state"] and first["names"] == 30 and second["names"] == 0
    assert first["loaded"] and second["loaded"]
    assert "model.norm.weight" in first["error"]


def test_mixed_precision_rounds_no_log_probs(tmp_path):
    first, _ = run_two(tmp_path, bf16=True)
    logps = torch.tensor(first["logps"])
    assert first["same"] and not torch.equal(logps, logps.bfloat16().float())


def test_models_that_are_not_cut(monkeypatch):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="fsdp: expected several processes"):
        check_pieces({"model": model})
    monkeypatch.setattr("fastdaa.online.pieces.processes", lambda: 2)
    check_pieces({"model": model})
    model.lm_head.bfloat16()
    with pytest.raises(ValueError, match="expected weights of one dtype to train, got bfloat16"):
        check_pieces({"model": model})
