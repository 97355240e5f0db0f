"""Training on a real tiny world: it learns, resumes bit for bit, and two processes equal one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import free_port
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.config.presets import to_json
from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.launch.environment import worker_environment
from persistworld_cli.launch.launcher import _command, run_task
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.cpu.native.build import without_kernels
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.training import action_margin, post_train, pretrain
from persistworld_cli.training.candidates import CandidateMaker, sampling_calls
from persistworld_cli.training.policy_switch import PolicySwitch
from persistworld_cli.training.post_train import PostTrainer
from persistworld_cli.training.run import Run
from persistworld_cli.training.sharing import Share, divide

ADAPTER = "weights/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What runs in this process computes as a worker does: sums in the same order, so results are equal bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """Settings for a few updates."""
    return replace(
        small_world,
        pretrain=PretrainSettings(
            updates=2,
            batch=2,
            lr=1e-3,
            ema=0.9,
            save_every=1,
            validate_every=2,
            log_every=1,
            check_every=2,
            check_rollouts=3,
            check_steps=1,
        ),
        post_train=PostTrainSettings(
            updates=2,
            groups=2,
            candidates=2,
            keep_best=1,
            keep_worst=1,
            prefix_max=1,
            steps=1,  # half of a prefix's: prefixes 1 and 0 let a process sample a candidate of the other's ...
            seed=4,  # ... as in both updates
            decay="cosine",
            save_every=1,
            lora_rank=4,
            lora_alpha=4,
        ),
    )


@pytest.fixture(scope="module")
def pretrained(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken pretraining in one process; not to be written to."""
    output = tmp_path_factory.mktemp("pretrained")
    pretrain.run(world, PretrainRequest(output=output))
    return output


@pytest.fixture(scope="module")
def post_trained(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken post-training in one process; not to be written to."""
    output = tmp_path_factory.mktemp("post-trained")
    post_train.run(world, PostTrainRequest(output=output))
    return output


def losses(output: Path, name: str) -> list[float]:
    """A logged number, update by update."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


# The worker, killed (-9) as soon as it has saved its first state.
KILLED = """
import os, signal, sys
from persistworld_cli import worker
from persistworld_cli.training.run import Run

save = Run.save

def save_and_die(self, step, state):
    save(self, step, state)
    os.kill(os.getpid(), signal.SIGKILL)

Run.save = save_and_die
worker.main(["worker", sys.argv[1]])
"""


def config_file(task: str, settings: Settings, output: Path) -> str:
    """What a launcher writes for its workers."""
    output.mkdir(parents=True, exist_ok=True)
    config = output / "config.json"
    config.write_text(json.dumps({"task": task, "settings": to_json(settings), "request": {"output": str(output)}}))
    return str(config)


def kill_after_first_state(task: str, settings: Settings, output: Path) -> None:
    command = [sys.executable, "-c", KILLED, config_file(task, settings, output)]
    assert subprocess.run(command, env=ENV).returncode == -signal.SIGKILL
    assert [path.name for path in (output / "state").iterdir()] == ["step-00000001"]


def test_pretraining_lowers_the_loss_on_what_it_sees(world: Settings, tmp_path: Path) -> None:
    options = replace(world.pretrain, updates=24, batch=1, validate_every=0, check_every=0, save_every=100)
    result = pretrain.run(replace(world, pretrain=options), PretrainRequest(output=tmp_path))
    curve = losses(tmp_path, "loss")
    assert sum(curve[-8:]) < sum(curve[:8])
    assert Path(result["weights"]).exists()
    assert "| updates | 24 |" in (tmp_path / "weights" / "README.md").read_text()


def test_killed_and_resumed_pretraining_equals_an_unbroken_run(
    world: Settings, pretrained: Path, tmp_path: Path
) -> None:
    kill_after_first_state("pretrain", world, tmp_path)
    pretrain.run(world, PretrainRequest(output=tmp_path))
    ours, theirs = (load_file(str(folder / "weights" / "model.safetensors")) for folder in (tmp_path, pretrained))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses(tmp_path, "loss") == losses(pretrained, "loss")


def test_killed_and_resumed_post_training_equals_an_unbroken_run(
    world: Settings, post_trained: Path, tmp_path: Path
) -> None:
    kill_after_first_state("post-train", world, tmp_path)
    post_train.run(world, PostTrainRequest(output=tmp_path))
    for file in ("adapter_model.safetensors", "action_encoder.safetensors"):
        ours, theirs = (load_file(str(folder / "weights" / "adapter" / file)) for folder in (tmp_path, post_trained))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert "## Training" in (tmp_path / "weights" / "adapter" / "README.md").read_text()
    assert losses(tmp_path, "reward") == losses(post_trained, "reward")
    assert losses(tmp_path, "lr") == pytest.approx([1e-4, 0.51e-4])  # along the cosine, whenever it was stopped


def test_a_full_disk_leaves_the_last_state_whole_and_says_so(
    world: Settings, post_trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(post_trained, output)
    shutil.rmtree(output / "state" / "step-00000002")
    state = output / "state" / "step-00000001" / "state.pt"
    whole = state.read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))  # EFBIG for a full disk's ENOSPC
    try:
        with pytest.raises(PersistWorldError) as full:
            post_train.run(world, PostTrainRequest(output=output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.value.what == "cannot be written: File too large"
    assert "free some disk and run the same command again" in str(full.value.fix)
    assert state.read_bytes() == whole and [path.name for path in state.parent.parent.iterdir()] == ["step-00000001"]
    post_train.run(world, PostTrainRequest(output=output))
    assert losses(output, "step") == [1, 2]
    assert (output / ADAPTER).read_bytes() == (post_trained / ADAPTER).read_bytes()


# Every rank: one task after another, since what takes longest is to start; of 8 held-out clips.
IN_TURN = """
import json, sys
from pathlib import Path
from persistworld_cli import worker
from persistworld_cli.training import action_margin

action_margin.CLIPS = 8
for config in map(Path, sys.argv[1:]):
    worker._run(json.loads(config.read_text()), config)
worker._leave_group()
"""


def test_two_pretraining_processes_equal_one_whole_and_sharded(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action_margin, "CLIPS", 8)
    options = replace(world.pretrain, batch=4, updates=3, validate_every=3, check_every=3)
    pretrain.run(replace(world, pretrain=options), PretrainRequest(output=tmp_path / "one"))
    launch = replace(world.launch, num_processes=2, threads=1, device="cpu")
    # one update whole, two sharded: one rank has two of the three rollouts, and the only video
    sharded = replace(options, shard=True, gradient_checkpointing=True, video_every=3, video_rollouts=1)
    configs = []
    for name, part in (("whole", replace(options, updates=1)), ("sharded", sharded)):
        written = config_file("pretrain", replace(world, pretrain=part, launch=launch), tmp_path / "two")
        configs.append(str(Path(written).rename(tmp_path / f"{name}.json")))
    script = tmp_path / "in_turn.py"
    script.write_text(IN_TURN)
    command = [*_command(launch, tmp_path)[:-3], str(script), *configs]  # in place of the worker as a module
    assert subprocess.run(command, env=worker_environment(launch)).returncode == 0
    for name in ("loss", "grad_norm", "val_loss", "val_reward", "val_base"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), abs=1e-5)
    one, two = (load_file(str(tmp_path / n / "weights" / "model.safetensors")) for n in ("one", "two"))
    # AdamW divides by a gradient's size, so one that is all rounding makes steps as large as any
    gap = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert gap.mean() < 1e-6 and (gap > 1e-5).float().mean() < 0.02
    # the states are alike, so that any number of ranks, sharded or not, continues from either
    saved = [
        torch.load(tmp_path / n / "state" / "step-00000003" / "state.pt", weights_only=True) for n in ("one", "two")
    ]
    (ones, how), (twos, same) = (tree_flatten(state) for state in saved)
    tensors = [(a, b) for a, b in zip(ones, twos, strict=True) if isinstance(a, torch.Tensor)]
    assert how == same and all(a.shape == b.shape and type(a) is type(b) for a, b in tensors)
    assert torch.cat([(a - b).abs().flatten() for a, b in tensors]).mean() < 1e-6


def test_two_processes_that_share_a_group_equal_one(world: Settings, tmp_path: Path) -> None:
    options = replace(world.post_train, groups=1, candidates=4, split_groups=True, credit="patch")
    world = replace(world, post_train=options)
    post_train.run(world, PostTrainRequest(output=tmp_path / "one"))
    together = replace(world, launch=replace(world.launch, num_processes=2, threads=1))
    code, result = run_task(together, PostTrainRequest(output=tmp_path / "two"))
    assert code == 0 and result["processes"] == 2
    require_equal(tmp_path / "two", tmp_path / "one")


def require_equal(two: Path, one: Path) -> None:
    """The post-trainings of another number of processes."""
    for name in ("reward", "loss", "grad_norm"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5)
    ours, theirs = (load_file(str(folder / ADAPTER)) for folder in (two, one))
    # Muon orthogonalises in bfloat16, so where a gradient is all but zero rounding is blown up to whole steps of 2e-5
    gap = torch.cat([(ours[k] - theirs[k]).abs().flatten() for k in ours])
    assert gap.mean() < 1e-6 and gap.max() < 5e-5


# sitecustomize.py of the workers: rank 1 is killed (-9) once, as soon as it starts.
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path

once = Path(__file__).with_name("killed")
if os.environ.get("RANK") == "1" and "persistworld_cli.worker" in sys.orig_argv and not once.exists():
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
LAUNCH = """
import json, sys
from persistworld_cli.config.presets import from_json
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.launch.launcher import run_task
print(run_task(from_json(json.loads(sys.argv[1])), PostTrainRequest(output=sys.argv[2])))
"""


def test_two_machines_restart_together_from_the_state_of_one_process_and_equal_it(
    world: Settings,
    post_trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLED_ONCE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    pair = {"num_machines": 2, "num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    machines = [replace(world, launch=replace(world.launch, threads=1, machine_rank=rank, **pair)) for rank in (0, 1)]
    out = tmp_path / "two"
    shutil.copytree(post_trained, out)
    shutil.rmtree(out / "state" / "step-00000002")
    command = [sys.executable, "-c", LAUNCH, json.dumps(to_json(machines[1])), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
        code, result = run_task(machines[0], PostTrainRequest(output=out))
        theirs = second.communicate()
    ours = capfd.readouterr().err
    assert (code, theirs[0]) == (0, "(0, {})\n"), (ours, theirs)
    assert result["processes"] == 2
    assert "restart 1 of 3: rank 1 was killed by SIGKILL after update 2; resuming from update 1, saved at" in theirs[1]
    assert "restart 1 of 3: the workers of another machine died" in ours and "resuming from update 1 of 2" in ours
    require_equal(out, post_trained)


def test_prefixes_are_uniform_independent_and_the_same_to_every_process(world: Settings) -> None:
    options, store = replace(world.post_train, split_groups=True), open_store(world)
    engine = RolloutEngine(load_world_model(world.model, world.world), world.sampling, store.stat())
    scorer = Scorer(world.rewards, world.world)
    seen = []
    for processes in (1, 4):
        shares = [Share.of(options, rank, processes) for rank in range(processes)]
        maker = CandidateMaker(engine, store, scorer, options, shares, processes - 1, list)
        seen.append([[maker.plan(update, group) for group in range(2)] for update in range(1000)])
    assert seen[0] == seen[1]
    shares = [Share.of(options, rank, 2) for rank in range(2)]
    for plans in seen[0][: options.updates]:  # so two processes of this run do lend
        calls = sampling_calls(options, world.sampling)
        assert divide(shares, [plan.prefix for plan in plans], *calls).lent(shares)
    counts = Counter(tuple(plan.prefix for plan in plans) for plans in seen[0])  # episodes leave room for 0 or 1
    assert set(counts) == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert all(abs(count - 250) < 70 for count in counts.values())  # 5 standard deviations


def test_the_use_of_actions_is_measured_under_the_scale_of_the_run(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = open_store(world).stat()
    wider = replace(stat, p99=2 * stat.p99)
    monkeypatch.setattr(post_train, "weights_stores", lambda *a, **k: [open_store(world).scaled_by(wider)])
    with Run.of(world, world.post_train, PostTrainRequest(output=tmp_path)) as work:
        trainer = PostTrainer(world, work)
    assert trainer.clips and all(source.stat is trainer.stat is wider for source in trainer.clips.sources)


def test_without_a_limit_gradients_are_as_they_are(world: Settings, pretrained: Path, tmp_path: Path) -> None:
    options = replace(world.pretrain, max_grad_norm=0.0, updates=1, validate_every=0, check_every=0)
    pretrain.run(replace(world, pretrain=options), PretrainRequest(output=tmp_path))
    assert losses(tmp_path, "grad_norm")[0] == losses(pretrained, "grad_norm")[0]
    base = load_file(str(world.model.ckpt))
    new = load_file(str(tmp_path / "weights" / "model.safetensors"))
    assert any((new[name] - base[name]).abs().max() > 1e-4 for name in new if name in base)


def test_policies_share_frozen_weights_and_start_equal(world: Settings) -> None:
    model = load_world_model(world.model, world.world)
    switch = PolicySwitch(model, PostTrainSettings(lora_rank=4, lora_alpha=4, lora_targets=("to_q", "to_v")))
    c, h, w = model.latent_shape
    x = torch.randn(1, 11, 2 * c, h, w)
    tokens = torch.randn(1, 11, model.settings.token_dim)

    def run(policy: str) -> torch.Tensor:
        with switch.use(policy), torch.no_grad():
            return model.unet(x, torch.zeros(1), tokens, torch.zeros(1, 3), return_dict=False)[0]

    assert torch.allclose(run("theta"), run("old"), atol=1e-6)
    assert torch.allclose(run("theta"), run("reference"), atol=1e-6)
    with torch.no_grad():
        for p in switch.parameters("theta"):
            p.add_(0.1 * torch.randn_like(p))
    assert not torch.allclose(run("theta"), run("reference"), atol=1e-4)
    assert torch.allclose(run("old"), run("reference"), atol=1e-6)
    for decay in (0.0, 0.9):  # equal policies stay equal
        switch.copy_theta(decay)
        pairs = zip(switch.parameters("theta"), switch.parameters("old"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.allclose(run("theta"), run("old"), atol=1e-4)
    assert all(p.requires_grad for p in switch.trainable()) and not model.unet.conv_in.weight.requires_grad


def test_a_network_held_in_bfloat16_computes_the_same_under_autocast(world: Settings) -> None:
    options = PostTrainSettings(lora_rank=4, lora_alpha=4, lora_targets=("to_q", "to_v"))
    made: list[list[torch.Tensor]] = []
    for held in (None, torch.bfloat16):
        model = load_world_model(world.model, world.world)
        switch = PolicySwitch(model, options, held)
        torch.manual_seed(1)
        with torch.no_grad():
            for policy in ("theta", "old"):
                for p in switch.parameters(policy):
                    p.add_(0.1 * torch.randn_like(p))
        c, h, w = model.latent_shape
        inputs = (torch.randn(1, 11, 2 * c, h, w), torch.zeros(1), torch.randn(1, 11, model.settings.token_dim))
        outs = []
        for policy, sampling in (("old", True), ("reference", True), ("old", False), ("theta", False)):
            learns = policy == "theta"
            with (
                switch.use(policy, sampling=sampling),
                torch.set_grad_enabled(learns),
                torch.autocast("cpu", torch.bfloat16),
                without_kernels(),
            ):
                outs.append(model.unet(*inputs, torch.zeros(1, 3), return_dict=False)[0])
        outs[-1].float().square().mean().backward()
        made.append([*outs, *(p.grad for p in switch.trainable() if p.grad is not None)])
    assert model.unet.conv_out.weight.dtype is torch.bfloat16 and model.dtype is torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True)) and not torch.equal(made[0][0], made[0][1])


def test_a_saved_adapter_merges_into_the_policy_it_was(world: Settings, tmp_path: Path) -> None:
    model = load_world_model(world.model, world.world)
    switch = PolicySwitch(model, PostTrainSettings(lora_rank=4, lora_alpha=4, lora_targets=("to_q", "to_v")))
    with torch.no_grad():
        for p in switch.parameters("theta"):
            p.add_(0.05 * torch.randn_like(p))
    switch.save_adapter(tmp_path / "adapter", "theta")
    merged = load_world_model(world.model, world.world, adapter=str(tmp_path / "adapter"))
    c, h, w = model.latent_shape
    inputs = (torch.randn(1, 11, 2 * c, h, w), torch.zeros(1), torch.randn(1, 11, model.settings.token_dim))
    with torch.no_grad():
        ours = model.unet(*inputs, torch.zeros(1, 3), return_dict=False)[0]
        theirs = merged.unet(*inputs, torch.zeros(1, 3), return_dict=False)[0]
    assert (ours - theirs).abs().max() < 1e-5
    action = torch.randn(1, 11, 7)
    assert torch.allclose(model.action_encoder(action), merged.action_encoder(action))


def test_an_episode_too_short_for_the_prefix_is_refused_before_training(world: Settings, tmp_path: Path) -> None:
    impossible = replace(world, post_train=replace(world.post_train, prefix="fixed", prefix_max=500))
    with pytest.raises(PersistWorldError, match="long enough"):
        post_train.run(impossible, PostTrainRequest(output=tmp_path))
