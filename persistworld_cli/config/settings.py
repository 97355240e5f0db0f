"""Every setting of the program, as frozen dataclasses. A preset (TOML) has one table for each field of `Settings`.

Nothing here imports torch: presets are validated, printed and handed to workers without it.
Defaults are Ctrl-World's / PersistWorld's values (arXiv 2510.10125, 2603.25685) unless a comment says otherwise.

A run that is resumed keeps its settings: one that differs from the saved run's is refused, for it would change the
result (config/resume.py). `free` and `FREE` mark those that may change all the same: what was done so far stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FREE = {"resume": "free"}  # metadata of a setting, or of a whole table


def free(default: Any) -> Any:
    """A setting that a resumed run may change, with its default."""
    return field(default=default, metadata=FREE)


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What is recorded: cameras in stacking order, image size, rate."""

    dataset: str = ""  # processed dataset (output of extract-latents); "bundled" = the shipped world
    raw: str = ""  # raw LeRobot dataset (input of extract-latents)
    cameras: tuple[str, ...] = ("exterior_1_left", "exterior_2_left", "wrist_left")
    exterior: tuple[int, ...] = (0, 1)  # indices into cameras
    wrist: tuple[int, ...] = (2,)
    height: int = 192
    width: int = 320
    rate_hz: float = 5.0
    state_fields: tuple[str, ...] = ("observation.state.cartesian_position", "observation.state.gripper_position")
    joint_fields: tuple[str, ...] = ("observation.state.joint_position", "observation.state.gripper_position")
    pixel_rounding: str = "nearest"  # nearest | down: how drawn images become 8-bit (videos, what policies see)
    val_rule: str = "id-ends-99"  # id-ends-99 (DROID) | info-splits (meta/info.json "splits") | every-N


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The world model's parts. `unet`, `vae`, `text`, `image`: keywords of the diffusers / transformers classes."""

    ckpt: str = ""  # weights: a file, a folder, a hub id, or "bundled:NAME"; training begins from them
    adapter: str = ""  # PEFT folder on top (post-trained LoRA + action encoder); "base" or "none": none
    inference: str = ""  # what inference runs: whole weights, or an adapter on ckpt; empty: ckpt, adapter
    stat: str = ""  # stat.json of what the weights were trained on; empty: what they carry, else the dataset's own
    stat_given: bool = free(False)  # model.stat is the user's own word: it goes before the weights'
    strict_actions: bool = free(False)  # refuse poses that do not look like those that the weights were trained on
    num_history: int = 6
    num_frames: int = 5
    action_dim: int = 7
    token_dim: int = 1024
    frame_level: bool = True
    temporal_token: str = "first"  # what temporal cross-attention sees: first (the oldest frame's token) | all
    text_cond: bool = True
    history_cond_zero: bool = False  # Ctrl-World's his_cond_zero: history frames get no current-frame channels
    fps_id: int = 7
    motion_bucket_id: int = 127
    posterior: str = "mode"  # images to latents: mode | sample (Ctrl-World's random draw, here the same in every run)
    norm_groups: int = 32  # groups of every GroupNorm of unet and vae; diffusers' 32, fewer at small widths
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(
        default_factory=dict
    )  # empty: no image encoder (Ctrl-World carries one it does not use)
    tokenizer: str = ""  # folder or hub id of a CLIP tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a clip is drawn from the model, and what of the past it is shown."""

    sampler: str = "euler"
    steps: int = 50
    guidance: float = 1.0  # 1: none; >1: rises linearly over the predicted frames from 1 to this
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    noise_aug: float = 0.02  # SVD's third id; training: pretrain.noise_aug
    history: tuple[int, ...] = (0, 0, -8, -6, -4, -2)  # entries of the buffer, oldest first
    history_policy: tuple[int, ...] = (0, 0, -12, -9, -6, -3)
    buffer_fill: int = 24  # copies of the first entry the buffer starts with
    decode_chunk: int = 7  # view-frames decoded as one clip
    decode_dtype: str = "float32"  # of the decoder's products: float32 | bfloat16 (SVD's overflows in float16)
    dtype: str = "float32"  # float32 | bfloat16 | float16
    cast: str = "autocast"  # what takes that type: autocast (products; weights float32) | model (all weights)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which frames make a training clip (method.md section 2)."""

    max_step: int = 2  # frame step 1..max_step, uniform
    history_stride: int = 4  # history spacing = stride x step frames
    zero_history_prob: float = 0.15  # history spacing 0 (all history = current frame)
    rollout_history_prob: float = 0.0  # ours: history laid out as a rollout shows it (SamplingSettings.history)
    datasets: dict[str, float] = field(default_factory=dict)  # processed dataset = weight; empty: world.dataset alone
    workers: int = free(2)  # processes that read ahead, for each training process; 0: it reads itself
    ahead: int = free(2)  # batches that each of them holds ready


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Teacher-forced training (EDM denoising loss on the predicted frames)."""

    parts: tuple[str, ...] = ("unet", "action_encoder")
    updates: int = free(100_000)
    batch: int = 64
    optimizer: str = "adamw"  # adamw | muon (matrices and kernels; AdamW for the rest)
    lr: float = 1e-5
    weight_decay: float = 0.0
    beta2: float = 0.99  # AdamW's second beta; ours, 0.999 in Ctrl-World
    warmup: int = 0
    decay: str = "constant"  # constant | cosine
    max_grad_norm: float = 1.0
    ema: float = 0.0  # decay of the averaged weights; 0 = none
    p_mean: float = 0.7
    p_std: float = 1.6
    history_noise: float = 0.3
    current_noise: float = 0.2
    noise_aug: float = 0.0
    token_drop: float = 0.05
    mixed_precision: str = "no"  # no | bf16 (fp16 would need loss scaling, which is not done)
    gradient_checkpointing: bool = free(False)
    accumulate: int = 1
    seed: int = 0
    save_every: int = free(500)
    keep: int = free(2)
    log_every: int = free(10)
    validate_every: int = free(500)  # updates between held-out losses; 0: none
    check_every: int = free(
        0
    )  # updates between closed-loop checks on held-out starts, the first weights beside; 0: none
    check_rollouts: int = 8
    check_steps: int = 14  # interactions of a check's rollout, and of a video's
    video_every: int = free(0)  # updates between videos of held-out rollouts beside the record; 0: none
    video_rollouts: int = free(2)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """Training of a small VAE from scratch (only for small worlds; the full-size one is SVD's)."""

    updates: int = free(4000)
    batch: int = 8
    clip: int = 5  # frames of a training clip: as many as are decoded as one clip later, since padding differs
    optimizer: str = "muon"  # muon | adamw
    lr: float = 1e-2
    train_encoder: bool = True  # False: from model.ckpt, the decoder alone; latents extracted before stay valid
    kl: float = 1e-6
    colour_weight: float = 4.0  # extra weight on saturated pixels: small coloured objects must survive
    edge_weight: float = 0.5  # weight of the gradient-difference loss
    seed: int = 0
    save_every: int = free(200)
    keep: int = free(2)
    mixed_precision: str = "no"


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Weights of the registered rewards (PersistWorld: -1 LPIPS + 1 SSIM + PSNR/32), and LPIPS's backbone."""

    weights: dict[str, float] = field(default_factory=lambda: {"lpips": -1.0, "ssim": 1.0, "psnr": 1.0 / 32})
    camera_weights: tuple[float, ...] = ()  # empty: equal
    lpips_net: str = "alex"
    lpips_backbone: str = (
        "auto"  # auto (AlexNet: shipped; vgg, squeeze: torchvision's) | path of a state dict | untrained
    )


@dataclass(frozen=True, kw_only=True)
class PostTrainSettings:
    """PersistWorld's post-training (arXiv 2603.25685; objective from DiffusionNFT, arXiv 2509.16117)."""

    updates: int = free(6000)
    groups: int = 4  # start states an update, over all processes
    split_groups: bool = free(False)  # fewer groups than processes: several share the candidates of one
    candidates: int = 16  # K
    keep_best: int = 5
    keep_worst: int = 5
    chunks: int = 1  # F
    prefix: str = "uniform"  # uniform | fixed | curriculum
    prefix_max: int = 9
    steps: int = 0  # sampling steps of candidates (more steps, more variety); 0: sampling.steps
    objective: str = "nft"  # nft | recorded (fine-tuning on own rollouts towards the record: a control)
    credit: str = "rollout"  # rollout (the paper's one scalar) | frame (each frame and camera its own) | patch
    credit_grid: tuple[int, ...] = (3, 5)  # rows and columns of patches of a camera's image
    explore: float = 0.0  # std of smooth noise (as coarse as credit_grid) laid on candidates' latents
    p_mean: float = 0.7  # ln sigma of the noise that candidates are learned under ~ N(p_mean, p_std^2)
    p_std: float = 1.6
    beta: float = 1.0
    weighting: str = "self"  # plain | self (each branch divided by its detached mean error, DiffusionNFT's code)
    adv_clip: float = 1.0
    kl: float = 1e-4
    sigmas_per_candidate: int = 1
    ema: str = "ramp"  # ramp: min(ema_rate * step, ema_max) | late-ramp: the same, 75 updates later | constant: ema_max
    ema_rate: float = 0.001
    ema_max: float = 0.5
    lora_rank: int = 64
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    train_action_encoder: bool = True
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) | adamw
    muon_scale: str = "match_rms_adamw"  # its step: match_rms_adamw (AdamW's size) | original (sqrt(rows / columns))
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    max_grad_norm: float = 1.0
    micro_batch: int = free(8)
    mixed_precision: str = "no"
    gradient_checkpointing: bool = free(False)
    margin_every: int = free(50)  # updates between measurements of whether actions are used, the base beside; 0: none
    referees: tuple[str, ...] = free(("sharpness_gap", "st_lpips"))  # watched in closed-loop checks; also module:Class
    validate_every: int = free(0)  # updates between closed-loop checks on held-out starts, the base beside; 0: none
    validate_rollouts: int = 8
    validate_steps: int = 14  # interactions of a check's rollout, and of a video's
    video_every: int = free(0)  # updates between videos of held-out rollouts, record and base beside; 0: none
    video_rollouts: int = free(2)
    collapse_checks: int = 3  # falls in a row that count as collapse, once below the base; 0: never
    on_collapse: str = "stop"  # stop | rollback (go on from the best check with half the learning rate)
    seed: int = 0
    save_every: int = free(50)
    keep: int = free(2)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The closed-loop benchmark (method.md section 5)."""

    benchmark: str = ""  # name or path of a benchmark file (presets/benchmarks); empty: none, these settings alone
    published: str = ""  # figures that persistworld verify compares with (presets/published)
    split: str = "val"
    episodes: tuple[str, ...] = free(())  # empty: all of the split
    starts: tuple[int, ...] = free((0,))
    steps: int = 14
    seeds: tuple[int, ...] = free((0,))
    crop: tuple[int, ...] = (0, 0, 0, 0)  # pixels left out of every metric: top, bottom, left, right
    colour_range: str = "unit"  # what metrics see: unit (in [0, 1], as drawn) | 8bit (rounded by world.pixel_rounding)
    moving_threshold: float = 0.08  # of the full range: a pixel that differs by more from the start has moved
    masks: tuple[str, ...] = ()  # DIR or NAME=DIR: psnr and ssim on pixels that the user marked
    following: tuple[str, ...] = free(())  # swapped, null: also roll out under these wrong actions
    following_steps: int = 4  # interactions of those rollouts
    fvd: str = free(
        ""
    )  # file of a video network's weights: also the Fréchet video distance by its features; empty: without
    fvd_net: str = free("r3d_18")  # which of torchvision's: r3d_18 | mc3_18 | r2plus1d_18
    batch: int = free(8)
    sheets: int = free(3)
    bootstrap: int = free(2000)
    study_trials: int = free(0)  # questions of a blind study (--study), drawn at random; 0: all
    study_cameras: str = free("groups")  # a question shows: groups (exterior or wrist cameras) | all (of them at once)


@dataclass(frozen=True, kw_only=True)
class DriveSettings:
    """Keyboard map and limits (method.md section 6)."""

    episode: str = ""
    start: int = 0
    step_m: float = 0.08
    gripper_open: float = 0.0
    gripper_closed: float = 0.70
    keys: dict[str, str] = field(  # letter = action (config.keys.ACTIONS)
        default_factory=lambda: {
            "l": "-y",
            "r": "+y",
            "f": "+x",
            "b": "-x",
            "u": "+z",
            "d": "-z",
            "o": "open",
            "c": "close",
        }
    )
    display: str = "auto"  # drive --live: auto | kitty | iterm | sixel | blocks | blocks-256 | none
    workspace_low: tuple[float, ...] = (0.3, -0.5, 0.01)
    workspace_high: tuple[float, ...] = (0.8, 0.5, 0.5)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """A policy in the loop over openpi's websocket protocol (method.md section 6)."""

    host: str = "127.0.0.1"
    port: int = 8000
    timeout_s: float = 60.0
    wait_s: float = 30.0
    layout: str = "pi05"  # pi05 | pi0 | pi0-fast
    camera: int = 1  # the exterior camera shown to the policy
    wrist_camera: int = 2
    resize: tuple[int, ...] = ()  # height, width that images are resized to before padding; empty: as drawn
    image_size: int = 224  # side of the padded square that is sent
    task: str = "bundled"
    skip: int = 0  # every skip-th row of the chunk is taken; 0: the task's
    gripper_cap: float = 0.0  # the most that the gripper may close; 0: the task's
    cap_current: bool = False  # whether that holds for the gripper of now too (row 0 of an interaction)
    steps: int = 0  # interactions; 0: the task's
    adapter: str = "gain"  # gain | meta (fitted by build-meta) | path of an MLP's weights
    gain: float = 0.054
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Processes and machines, handed to accelerate."""

    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = ""
    main_process_port: int = 0  # 0: a free one
    threads: int = 0  # CPU threads a process; 0: cores / processes
    device: str = "auto"  # auto | cpu | cuda
    compile: bool = False  # torch.compile the network for sampling (eval, frontier, replay, drive, pi-rollout)
    trackers: tuple[str, ...] = ("tensorboard",)  # of training runs: tensorboard, wandb, trackio; or none


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
    drive: DriveSettings = field(default_factory=DriveSettings, metadata=FREE)
    policy: PolicySettings = field(default_factory=PolicySettings, metadata=FREE)
    launch: LaunchSettings = field(default_factory=LaunchSettings, metadata=FREE)
