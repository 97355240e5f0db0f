"""Every setting of the program, as frozen dataclasses. A preset (TOML) has one table for each field of `Settings`.

Nothing here imports torch: presets are validated, printed and handed to workers without it.
Defaults are Ctrl-World's / PersistWorld's values (arXiv 2510.10125, 2603.25685) unless a comment says otherwise.
Bounds and choices are in the annotations (config/fields.py); rules between settings are in config/check.py.

A resumed run keeps its settings: a change that would affect the result is refused (config/resume.py). `free` and `FREE`
mark settings that may change, because the finished work stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from persistworld_cli.config.fields import (
    FREE,
    Bounds,
    Count,
    Known,
    NonNegative,
    Port,
    Positive,
    Share,
    Whole,
    field_types,
    free,
)

Reward = Annotated[str, Known("reward", ("lpips", "ssim", "psnr"))]  # metrics/registry.py has them
Referee = Annotated[str, Known("referee", ("sharpness_gap", "st_lpips"))]  # metrics/referees.py
SAMPLER_NAMES = ("euler", "heun", "dpmpp-2m", "dpmpp-3m", "unipc")
Sampler = Annotated[str, Known("sampler", SAMPLER_NAMES)]  # models/samplers.py
Tracker = Literal["tensorboard", "wandb", "trackio", "none"]  # each the name of its package
Precision = Literal["no", "bf16"]
_LIMITS = {"x": (0.3, 0.8), "y": (-0.5, 0.5), "z": (0.01, 0.5)}
_STEP = {"x": 0.08, "y": 0.08, "z": 0.08}
_KEYS = {
    **{"l": "-y left", "r": "+y right", "f": "+x forward", "b": "-x back", "u": "+z up", "d": "-z down"},
    **{"o": "gripper=0 open", "c": "gripper=0.7 close"},
}
_IMAGES = {"observation/exterior_image_1_left": "exterior_2_left", "observation/wrist_image_left": "wrist_left"}
Optimizer = Literal["muon", "adamw"]  # muon: matrices and kernels; AdamW for the rest


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What is recorded: cameras in stacking order, image size, rate."""

    dataset: str = ""  # processed dataset (output of extract-latents)
    raw: str = ""  # raw LeRobot dataset (input of extract-latents)
    cameras: tuple[str, ...] = ("exterior_1_left", "exterior_2_left", "wrist_left")
    exterior: tuple[int, ...] = (0, 1)  # indices into cameras
    wrist: tuple[int, ...] = (2,)
    height: Count = 192
    width: Count = 320
    rate_hz: Positive = 5.0
    state_fields: tuple[str, ...] = ("observation.state.cartesian_position", "observation.state.gripper_position")
    joint_fields: tuple[str, ...] = ("observation.state.joint_position", "observation.state.gripper_position")
    pixel_rounding: Literal["nearest", "down"] = "nearest"  # to 8 bits: of videos, and of images that policies see
    val_rule: str = "id-ends-99"  # id-ends-99 (DROID) | info-splits (meta/info.json "splits") | every-N


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The world model's parts. `unet`, `vae`, `text`, `image`: keywords of the diffusers / transformers classes."""

    ckpt: str = ""  # weights: a file, a folder, a hub id, or "bundled:NAME"; training begins from them
    adapter: str = ""  # PEFT folder on top (post-trained LoRA + action encoder); "base" or "none": none
    inference: str = ""  # what inference runs: whole weights, or an adapter on ckpt; empty: ckpt, adapter
    stat: str = ""  # stat.json of what the weights were trained on; empty: the weights' own, else the dataset's
    stat_given: bool = free(False)  # the user named model.stat: it takes precedence over the weights' own
    strict_actions: bool = free(False)  # refuse poses that do not look like those that the weights were trained on
    num_history: Count = 6
    num_frames: Count = 5
    action_dim: Count = 7
    token_dim: Count = 1024
    frame_level: bool = True
    temporal_token: Literal["first", "all"] = "first"  # what temporal cross-attention sees; first: the oldest frame's
    text_cond: bool = True
    history_cond_zero: bool = False  # Ctrl-World's his_cond_zero: history frames get no current-frame channels
    fps_id: int = 7
    motion_bucket_id: int = 127
    posterior: Literal["mode", "sample"] = "mode"  # of the VAE; sample: Ctrl-World's draw, here the same in every run
    norm_groups: Count = 32  # groups of every GroupNorm of unet and vae; diffusers' 32, fewer at small widths
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)  # empty: no image encoder (Ctrl-World carries an unused one)
    tokenizer: str = ""  # folder or hub id of a CLIP tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a clip is sampled from the model, and which past frames it is conditioned on."""

    sampler: Sampler = "euler"
    steps: Count = 50
    # Above 1, the scale rises linearly over the predicted frames from 1 to this.
    guidance: Annotated[float, Bounds(ge=1, fix="1 means no guidance")] = 1.0
    sigma_min: Positive = 0.002
    sigma_max: float = 700.0
    rho: Positive = 7.0
    noise_aug: NonNegative = 0.02  # SVD's third id; training: pretrain.noise_aug
    history: tuple[int, ...] = (0, 0, -8, -6, -4, -2)  # entries of the buffer, oldest first
    history_policy: tuple[int, ...] = (0, 0, -12, -9, -6, -3)
    buffer_fill: Count = 24  # copies of the first entry the buffer starts with
    decode_chunk: Count = 7  # view-frames decoded as one clip
    decode_dtype: Literal["float32", "bfloat16"] = "float32"  # of the decoder's products (SVD's overflows in float16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cast: Literal["autocast", "model"] = "autocast"  # what has that type: products only (autocast), or all weights


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which frames make a training clip (method.md section 2)."""

    max_step: Count = 2  # frame step 1..max_step, uniform
    history_stride: Count = 4  # history spacing = stride x step frames
    zero_history_prob: Share = 0.15  # history spacing 0 (all history = current frame)
    rollout_history_prob: Share = 0.0  # ours: history laid out as a rollout shows it (SamplingSettings.history)
    # processed dataset = weight; empty: only world.dataset
    datasets: dict[str, NonNegative] = field(default_factory=dict)
    workers: Whole = free(2)  # prefetch processes per training process; 0: it reads the data itself
    ahead: Count = free(2)  # batches that each of them prefetches


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Teacher-forced training (EDM denoising loss on the predicted frames)."""

    parts: tuple[str, ...] = ("unet", "action_encoder")
    updates: Count = free(100_000)
    batch: Count = 64
    optimizer: Optimizer = "adamw"
    lr: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.99  # AdamW's second beta; ours, 0.999 in Ctrl-World
    warmup: Whole = 0
    decay: Literal["constant", "cosine"] = "constant"
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    ema: Share = 0.0  # decay of the averaged weights; 0 = none
    p_mean: float = 0.7
    p_std: Positive = 1.6
    history_noise: NonNegative = 0.3
    current_noise: NonNegative = 0.2
    noise_aug: NonNegative = 0.0
    token_drop: Share = 0.05
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = free(False)
    shard: bool = free(False)  # FSDP2: each process holds its share of all that is trained; AdamW only
    accumulate: Count = 1
    seed: int = 0
    save_every: Count = free(500)
    keep: Count = free(2)
    log_every: Count = free(10)
    validate_every: Whole = free(500)  # updates between held-out losses; 0: none
    check_every: Whole = free(0)  # updates between closed-loop checks, with the first weights; 0: none
    check_rollouts: Count = 8
    check_steps: Count = 14  # interactions of a check's rollout, and of a video's
    video_every: Whole = free(0)  # updates between videos of held-out rollouts beside the record; 0: none
    video_rollouts: Count = free(2)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """Training of a small VAE from scratch (only for small worlds; the full-size one is SVD's)."""

    updates: Count = free(4000)
    batch: Count = 8
    clip: Count = 5  # frames of a training clip: as many as are decoded as one clip later, since padding differs
    optimizer: Optimizer = "muon"
    lr: Positive = 1e-2
    train_encoder: bool = True  # False: only the decoder, from model.ckpt; extracted latents stay valid
    kl: NonNegative = 1e-6
    colour_weight: NonNegative = 4.0  # extra weight on saturated pixels: small coloured objects must survive
    edge_weight: NonNegative = 0.5  # weight of the gradient-difference loss
    seed: int = 0
    save_every: Count = free(200)
    keep: Count = free(2)
    mixed_precision: Precision = "no"


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Weights of the rewards (PersistWorld: -1 LPIPS + 1 SSIM + PSNR/32), and LPIPS's backbone."""

    weights: dict[Reward, float] = field(default_factory=lambda: {"lpips": -1.0, "ssim": 1.0, "psnr": 1.0 / 32})
    camera_weights: tuple[NonNegative, ...] = ()  # empty: equal
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    # auto (AlexNet: shipped; vgg, squeeze: torchvision's) | path of a state dict | untrained
    lpips_backbone: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PostTrainSettings:
    """PersistWorld's post-training (arXiv 2603.25685; objective from DiffusionNFT, arXiv 2509.16117)."""

    updates: Count = free(6000)
    groups: Count = 4  # start states per update, over all processes
    split_groups: bool = free(False)  # fewer groups than processes: several share the candidates of one
    candidates: Annotated[int, Bounds(ge=2, fix="a group's candidates are compared (the paper uses 16)")] = 16  # K
    keep_best: Whole = 5
    keep_worst: Whole = 5
    chunks: Count = 1  # F
    prefix: Literal["uniform", "fixed", "curriculum"] = "uniform"
    prefix_max: Whole = 9
    steps: Whole = 0  # sampling steps of candidates (more steps, more variety); 0: sampling.steps
    objective: Literal["nft", "recorded"] = "nft"  # recorded: fine-tuning on own rollouts towards the record, a control
    # One reward per rollout (the paper's), per frame and camera, or per patch of those.
    credit: Literal["rollout", "frame", "patch"] = "rollout"
    credit_grid: tuple[Count, Count] = (3, 5)  # rows and columns of patches of a camera's image
    explore: NonNegative = 0.0  # std of smooth noise (as coarse as credit_grid) added to candidates' latents
    p_mean: float = 0.7  # candidates are trained on at noise levels ln sigma ~ N(p_mean, p_std^2)
    p_std: NonNegative = 1.6
    beta: Positive = 1.0
    weighting: Literal["plain", "self"] = "self"  # self: each branch over its detached mean error (DiffusionNFT's code)
    adv_clip: Positive = 1.0
    kl: NonNegative = 1e-4
    sigmas_per_candidate: Count = 1
    # ramp: min(ema_rate * step, ema_max); late-ramp: the same, 75 updates later; constant: ema_max
    ema: Literal["ramp", "constant", "late-ramp"] = "ramp"
    ema_rate: NonNegative = 0.001
    ema_max: Share = 0.5
    lora_rank: Count = 64
    lora_alpha: Count = 64
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    train_action_encoder: bool = True
    optimizer: Optimizer = "muon"
    # Muon's step: AdamW's size, or sqrt(rows / columns)
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.0
    warmup: Whole = 0
    decay: Literal["constant", "cosine"] = "constant"
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    micro_batch: Count = free(8)
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = free(False)
    margin_every: Whole = free(50)  # updates between measurements of whether actions are used, with the base; 0: none
    referees: tuple[Referee, ...] = free(("sharpness_gap", "st_lpips"))  # reported by closed-loop checks
    validate_every: Whole = free(0)  # updates between closed-loop checks on held-out starts, with the base; 0: none
    validate_rollouts: Count = 8
    validate_steps: Count = 14  # interactions of a check's rollout, and of a video's
    video_every: Whole = free(0)  # updates between videos of held-out rollouts, with record and base; 0: none
    video_rollouts: Count = free(2)
    collapse_checks: Whole = 3  # successive falls that count as collapse, once below the base; 0: never
    on_collapse: Literal["stop", "rollback"] = "stop"  # rollback: from the best check, with half the learning rate
    seed: int = 0
    save_every: Count = free(50)
    keep: Count = free(2)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The closed-loop benchmark (method.md section 5)."""

    benchmark: str = ""  # name or path of a benchmark file (presets/benchmarks); empty: none, only these settings
    published: str = ""  # figures that persistworld verify compares with (presets/published)
    split: str = "val"
    episodes: tuple[str, ...] = free(())  # empty: all of the split
    starts: tuple[int, ...] = free((0,))
    steps: Count = 14
    seeds: tuple[int, ...] = free((0,))
    crop: tuple[Whole, Whole, Whole, Whole] = (0, 0, 0, 0)  # pixels left out of metrics: top, bottom, left, right
    colour_range: Literal["unit", "8bit"] = "unit"  # of scored images: as sampled, or rounded by world.pixel_rounding
    # Share of the full range: a pixel that differs by more from the start has moved.
    moving_threshold: Annotated[float, Bounds(gt=0, lt=1)] = 0.08
    masks: tuple[str, ...] = ()  # DIR or NAME=DIR: psnr and ssim on pixels that the user marked
    following: tuple[Literal["swapped", "null"], ...] = free(())  # also roll out under these wrong actions
    following_steps: Count = 4  # interactions of those rollouts
    fvd: str = free("")  # weights of a video network: also the Fréchet video distance of its features; empty: without
    fvd_net: Literal["r3d_18", "mc3_18", "r2plus1d_18"] = free("r3d_18")  # which of torchvision's
    batch: Count = free(8)
    sheets: Whole = free(3)
    bootstrap: Whole = free(2000)
    study_trials: Whole = free(0)  # questions of a blind study (--study), drawn at random; 0: all
    study_cameras: Literal["groups", "all"] = free("groups")  # a question shows exterior or wrist cameras, or all


@dataclass(frozen=True, kw_only=True)
class RobotSettings:
    """What the numbers of a state mean (the model's actions are states), and the limits of commanded states."""

    name: str = ""  # robot_type of written datasets; empty: Franka with its pose, else unknown
    # "NAME UNIT" of every number, in order; empty: Franka's pose, if world.state_fields are DROID's
    dimensions: tuple[str, ...] = ()
    limits: dict[str, tuple[float, float]] = field(default_factory=_LIMITS.copy)  # name = [low, high]; others: none
    # of policies that answer in joints: panda, or module:Class; empty: panda with Franka's pose, else none
    kinematics: Annotated[str, Known("kinematics", ("panda", ""))] = ""


@dataclass(frozen=True, kw_only=True)
class DriveSettings:
    """Start and keyboard map (method.md section 6)."""

    episode: str = ""
    start: Whole = 0
    step: dict[str, Positive] = field(default_factory=_STEP.copy)  # dimension = change by one key
    # letter = "+NAME", "-NAME" (by its step) or "NAME=VALUE" (to that value), then a label
    keys: dict[str, str] = field(default_factory=_KEYS.copy)
    display: Literal["auto", "kitty", "iterm", "sixel", "blocks", "blocks-256", "none"] = "auto"  # of drive --live
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """A policy in the loop over openpi's websocket protocol (method.md section 6)."""

    host: str = "127.0.0.1"
    port: Port = 8000
    timeout_s: Positive = 60.0
    wait_s: NonNegative = 30.0
    actions: Literal["joint-velocity", "joint-position", "pose", "model"] = (
        "joint-velocity"  # policies/action_spaces.py
    )
    rate_hz: Positive = 15.0  # rows of an answer per second
    images: dict[str, str] = field(default_factory=_IMAGES.copy)  # field of an observation = camera
    resize: tuple[Count, ...] = ()  # height, width that images are resized to before padding; empty: as sampled
    image_size: Count = 224  # side of the padded square that is sent
    task: str = "episodes"
    skip: Whole = 0  # every skip-th row of the chunk is taken; 0: the task's
    gripper_cap: Share = 0.0  # the most that the gripper may close; 0: the task's gripper_cap and gripper_stops
    cap_current: bool = False  # whether gripper_cap also limits the current gripper (row 0 of an interaction)
    steps: Whole = 0  # interactions; 0: the task's
    joint_limits: Literal["refuse", "stop"] = "refuse"  # a policy that passes one: refuse it, or the joint stays there
    joint_velocity_adapter: str = "gain"  # gain | meta (fitted by build-meta) | path of an MLP's weights
    gain: Positive = 0.054  # of joint_velocity_adapter = "gain": rad per row at velocity 1
    position_gain: Annotated[float, Bounds(gt=0, le=1)] = 0.27  # share of the way to commanded joints covered in a row
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Processes and machines, handed to accelerate."""

    num_processes: Count = 1
    num_machines: Count = 1
    machine_rank: Whole = 0
    main_process_ip: str = ""
    main_process_port: Port = 0  # 0: a free one
    restarts: Whole = 3  # how often workers that died are restarted from the last state, on all machines
    threads: Whole = 0  # CPU threads per process; 0: cores / processes
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False  # torch.compile the network for sampling (eval, frontier, replay, drive, pi-rollout)
    # What a GPU computes in TF32 (10 bits of a factor) where types are float32; convolutions: as torch by default.
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    trackers: tuple[Tracker, ...] = ("tensorboard",)  # of training runs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole preset."""

    world: WorldSettings = field(default_factory=WorldSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    post_train: PostTrainSettings = field(default_factory=PostTrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    robot: RobotSettings = field(default_factory=RobotSettings, metadata=FREE)
    drive: DriveSettings = field(default_factory=DriveSettings, metadata=FREE)
    policy: PolicySettings = field(default_factory=PolicySettings, metadata=FREE)
    launch: LaunchSettings = field(default_factory=LaunchSettings, metadata=FREE)


@cache
def setting_types() -> dict[str, Any]:
    """``table.key`` -> its annotation, for every setting."""
    tables = field_types(Settings).items()
    return {f"{table}.{name}": hint for table, cls in tables for name, hint in field_types(cls).items()}
