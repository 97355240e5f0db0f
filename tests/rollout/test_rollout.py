"""The rollout engine: the golden replay, and that batches, branches and noise do not disturb one another."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import GoldenFiles
from golden_model import golden_model, worst
from golden_table import close
from safetensors.torch import load_file

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import SamplingSettings, Settings
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import build_world_model
from persistworld_cli.robot.keyboard import KeyMap
from persistworld_cli.rollout.engine import RolloutEngine, RolloutState, rollout_noise
from persistworld_cli.rollout.history import Memory
from persistworld_cli.rollout.images import to_uint8
from persistworld_cli.rollout.recording import recorded_poses


@pytest.mark.parametrize("tag", ["g1", "g2"])
def test_golden_replay_interaction_by_interaction(golden: GoldenFiles, tag: str) -> None:
    d = load_file(str(golden / "tiny_rollout_replay.safetensors"))
    meta = json.loads((golden / "tiny_rollout_meta.json").read_text())["replay"][tag]
    get = {k.split(".", 1)[1]: v for k, v in d.items() if k.startswith(f"{tag}.")}
    stat = ActionStat(np.array(meta["state_p01"]), np.array(meta["state_p99"]))
    sampling = SamplingSettings(steps=meta["steps"], guidance=meta["guidance"])
    engine = RolloutEngine(golden_model(encoder=golden / "tiny_ctrl_world.safetensors"), sampling, stat)
    states = get["traj_states"].numpy()
    state = RolloutState(Memory(get["first_latent"][None], states[:1], 24), d["text_embeds"])
    what = f"I replay {tag}"
    for i, noise in enumerate(get["noise"]):
        poses = recorded_poses(states, 0, i, 5)[None]
        inputs = engine.inputs(state, poses)
        close(f"{what}, history and current frame", inputs.history[0], get["history"][i], 5e-5)
        close(f"{what}, history and current frame", inputs.current[0], get["current"][i], 5e-5)
        close(f"{what}, normalised poses", inputs.actions[0], get["pose_norm"][i], 1e-6)
        with torch.no_grad():
            close(f"{what}, tokens", engine.condition(inputs).tokens[0], get["action_hidden"][i], 1e-5)
        predicted = engine.step(state, poses, noise[None])
        close(f"{what}, {len(get['noise'])} interactions", predicted[0], get["pred"][i], 5e-5)
        drawn = to_uint8(engine.model.decode_latents(predicted[0], sampling.decode_chunk), "down")  # (5, V, H, W, 3)
        close(f"{what}, mean of each 8-bit image", drawn.mean(axis=(2, 3, 4)).T, get["frame_mean"][i], 0.01)
    assert len(state.memory) == 24 + len(get["noise"])


@pytest.mark.parametrize("case", ["replay.g2", "keyboard.g2", "pi.skip2", "pi.skip3"])
def test_what_the_network_is_shown_is_what_the_reference_shows_it(
    golden: GoldenFiles, engine: RolloutEngine, case: str
) -> None:
    """Poses, and history and current frames of each interaction (a corner of them), after its own predictions."""
    data = load_file(str(golden / "rollouts.safetensors"))
    d = {k.removeprefix(case + "."): v for k, v in data.items() if k.startswith(case + ".")}
    stat, sampling = ActionStat(*d["stat"].numpy()), engine.sampling
    entries = sampling.history_policy if case.startswith("pi") else sampling.history
    own = RolloutEngine(engine.model, sampling, stat, entries)
    state = RolloutState(Memory(d["first_latent"][None], d["pose_raw"][:1, 0].numpy(), 24), None)
    for i, predicted in enumerate(d["pred"]):
        if case.startswith("replay"):
            poses = recorded_poses(d["traj_states"].numpy(), 0, i, 5)[None]
        elif case.startswith("keyboard"):
            poses = KeyMap(Settings()).chunk(state.memory.current[1][0], "lfduco"[i])[None]
        else:
            poses = d["poses_taken"][i][None].numpy()
        close(f"I {case}, poses", poses[0], d["pose_raw"][i, 6:], 1e-10)
        inputs = own.inputs(state, poses)
        close(f"I {case}, normalised poses", inputs.actions[0], d["pose_norm"][i], 1e-6)
        assert torch.equal(inputs.history[0], d["history"][i]) and torch.equal(inputs.current[0], d["current"][i])
        state.memory.append(predicted[None, -1], poses[:, -1])


@pytest.fixture(scope="module")
def engine() -> RolloutEngine:
    """The tiny preset's network with random weights, two sampling steps, float32."""
    settings = load_settings("tiny", [], {})
    torch.manual_seed(0)
    model = build_world_model(settings.model, settings.world).eval()
    sampling = replace(settings.sampling, steps=2, dtype="float32")
    return RolloutEngine(model, sampling, ActionStat(-np.ones(7), np.ones(7)))


def begin(engine: RolloutEngine, rows: int) -> RolloutState:
    """`rows` different rollouts."""
    c, h, w = engine.model.latent_shape
    first = torch.randn(rows, c, h, w, generator=torch.Generator().manual_seed(5))
    return engine.start(first, np.linspace(-0.5, 0.5, rows * 7).reshape(rows, 7), ["push the red cube forward"] * rows)


def poses(rows: int) -> np.ndarray:
    """Five poses a rollout."""
    return np.linspace(-0.4, 0.4, rows * 35).reshape(rows, 5, 7)


def test_states_far_outside_those_of_the_training_are_reported_once(
    engine: RolloutEngine, caplog: pytest.LogCaptureFixture
) -> None:
    own = RolloutEngine(engine.model, engine.sampling, ActionStat(-np.ones(7), np.ones(7), tuple("xyzabcd")))
    state, far = begin(own, 1), poses(1)
    far[0, :2, 1] = -1.8, 1.4  # over and under a quarter of the range outside
    for many in [poses(1)] * 3 + [far]:
        own.inputs(state, many)  # 1 of 20: no more than 5%
    assert not caplog.messages
    for _ in range(2):
        own.inputs(state, far)
    (message,) = caplog.messages
    assert message.endswith("\n  y: 2 of 25 poses, up to 0.8 outside -1 .. 1")


def test_a_rollout_is_the_same_in_any_batch(engine: RolloutEngine) -> None:
    keys = [(0, str(row), 0, 0) for row in range(3)]
    together = engine.step(begin(engine, 3), poses(3), rollout_noise(keys, engine.noise_shape))
    for row in range(3):
        alone = engine.step(
            begin(engine, 3).select([row]), poses(3)[[row]], rollout_noise([keys[row]], engine.noise_shape)
        )
        assert worst(alone[0], together[row]) < 1e-4


def test_branches_do_not_touch_their_parent(engine: RolloutEngine) -> None:
    parent = begin(engine, 1)
    before, length = parent.memory.current[0].clone(), len(parent.memory)
    branch = parent.select([0, 0])
    noise = rollout_noise([(0, "a", 0, 0), (1, "a", 0, 0)], engine.noise_shape)
    made = engine.step(branch, np.repeat(poses(1), 2, axis=0), noise)
    assert len(parent.memory) == length and len(branch.memory) == length + 1
    assert torch.equal(parent.memory.current[0], before)
    assert not torch.allclose(made[0], made[1])
    assert torch.equal(branch.select([1, 0]).memory.current[0], made[[1, 0], -1])


def test_a_rollout_of_another_presets_data_is_refused(engine: RolloutEngine) -> None:
    c, h, w = engine.model.latent_shape
    with pytest.raises(PersistWorldError, match="3 cameras of 48x80"):  # one camera less in the dataset
        engine.start(torch.zeros(1, c, h // 3 * 2, w), np.zeros((1, 7)), ["go"])
    with pytest.raises(PersistWorldError, match="8 numbers, this preset's model takes 7"):
        engine.start(torch.zeros(1, c, h, w), np.zeros((1, 8)), ["go"])


def test_history_reads_the_entries_it_names() -> None:
    memory = Memory(torch.zeros(1, 1, 1, 1), np.zeros((1, 7)), 24)
    for step in range(1, 10):
        memory.append(torch.full((1, 1, 1, 1), float(step)), np.full((1, 7), step))
    latents, states = memory.history((0, 0, -8, -6, -4, -2))
    assert latents.flatten().tolist() == [0, 0, 2, 4, 6, 8]
    assert states[0, :, 0].tolist() == [0, 0, 2, 4, 6, 8]


def test_noise_depends_on_its_key_alone() -> None:
    shape = (2, 3)
    a = rollout_noise([(0, "7", 0, 0), (0, "7", 0, 1)], shape)
    b = rollout_noise([(0, "7", 0, 1)], shape)
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert abs(rollout_noise([(3, "x", 0, 0)], (100_000,)).std().item() - 1) < 0.02


def test_the_noise_of_a_rollout_counts_its_interactions_and_branches_count_anew(engine: RolloutEngine) -> None:
    c, h, w = engine.model.latent_shape
    state = engine.start(torch.zeros(1, c, h, w), np.zeros((1, 7)), ["go"], [(3, "7", 2)])
    assert state.noise_keys() == [(3, "7", 2, 0)] and state.noise_keys(branch=1) == [(3, "7", 2, 0, 1)]
    state.append(torch.zeros(1, c, h, w), np.zeros((1, 7)))
    assert state.select([0, 0]).noise_keys() == [(3, "7", 2, 1)] * 2
    assert state.branch([(0, "a"), (0, "b")]).noise_keys() == [(0, "a", 0), (0, "b", 0)]


def test_recorded_poses_are_clipped_to_the_recording() -> None:
    states = np.arange(10.0)[:, None]
    assert recorded_poses(states, 2, 1, 5)[:, 0].tolist() == [6, 7, 8, 9, 9]
