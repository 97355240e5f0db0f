from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from persistworld_cli.data.raw import video
from persistworld_cli.data.raw.clock import Clock
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError


def numbered(count: int, height: int = 48, width: int = 80) -> np.ndarray:
    """Frames that tell their number: the last digit by the left half's brightness, the rest by the right half's."""
    out = np.empty((count, height, width, 3), np.uint8)
    for n in range(count):
        out[n, :, : width // 2] = 20 + 10 * (n % 10)
        out[n, :, width // 2 :] = 20 + 10 * (n // 10)
    return out


def numbers(frames: np.ndarray) -> list[int]:
    low, high = (((frames[:, 8:40, x].mean(axis=(1, 2, 3)) - 20) / 10).round() for x in (slice(8, 32), slice(48, 72)))
    return (low + 10 * high).astype(int).tolist()


def test_frames_come_back_in_any_order_with_repeats(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video.write_mp4(path, numbered(40), 5, crf=1)
    assert video.count_frames(path) == 40
    wanted = [39, 0, 7, 7, 3]
    assert numbers(video.read_frames(path, wanted)) == wanted


def rows(path: Path, count: int, wanted: list[int], begin: float | None = None, threads: int = 0) -> list[int]:
    clock = Clock.of(np.arange(count) / 15, 15)
    return numbers(np.stack(list(video.iter_rows(path, clock, wanted, name="it", begin=begin, threads=threads))))


def test_a_far_start_is_reached_by_seeking_to_the_same_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video.write_mp4(path, numbered(180), 15, crf=1)
    assert rows(path, 119, [0, 39, 40, 40, 118], begin=61 / 15) == [61, 100, 101, 101, 179]
    with pytest.raises(PersistWorldError, match="video ends after 180 frames, frame 180 is wanted"):
        video.read_frames(path, [170, 180])
    with pytest.raises(PersistWorldError, match="it has 119 frames, the table 120 rows"):
        rows(path, 120, [0], begin=61 / 15)


def test_colours_survive_without_bias(tmp_path: Path) -> None:
    y, x = np.mgrid[:48, :80]
    smooth = np.stack([128 + 90 * np.sin(x / 25), 128 + 80 * np.cos(y / 20), 128 + 70 * np.sin((x + y) / 30)], -1)
    image = smooth.round().astype(np.uint8)
    video.write_mp4(tmp_path / "a.mp4", [image], 5, crf=1)
    back = video.read_frames(tmp_path / "a.mp4", [0])[0].astype(float)
    assert np.abs((back - image).mean(axis=(0, 1))).max() < 0.5  # swscale's defaults: 1.1
    assert np.abs(back - image).mean() < 1.0


def test_a_depth_video_is_gray_by_its_steps(tmp_path: Path) -> None:
    steps = [0, 400, 401, 2048, 4095]
    with av.open(
        str(tmp_path / "a.mp4"), "w"
    ) as container:  # as LeRobot 0.6.1 encodes depth: 12 bits in HEVC, lossless
        stream = container.add_stream("libx265", rate=15, options={"x265-params": "lossless=1:log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gray12le"
        for step in steps:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64), step, np.uint16), "gray12le")))
        container.mux(stream.encode())
    frames = video.read_frames(tmp_path / "a.mp4", range(5)).astype(float)
    assert frames.std(axis=(1, 2, 3)).max() == 0
    assert frames[:, 0, 0, 0] == pytest.approx(np.array(steps) / 16, abs=1)


def test_odd_sizes_are_padded_to_even(tmp_path: Path) -> None:
    video.write_mp4(tmp_path / "a.mp4", numbered(2, 47, 79), 5)
    assert video.read_frames(tmp_path / "a.mp4", [1]).shape == (1, 48, 80, 3)


def test_resize_is_antialiased_as_pil_does(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 180, 320, 3), dtype=np.uint8)
    for height, width in ((192, 320), (48, 80)):
        ours = resize(frames, height, width)
        pil = np.stack(
            [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BILINEAR)) for f in frames]
        )
        assert ours.shape == (2, height, width, 3)
        assert np.abs(ours.astype(int) - pil).max() <= 1
    assert resize(frames, 180, 320) is frames


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((180, 320), (48, 80)),
        ((180, 320), (192, 320)),
        ((33, 50), (90, 71)),
        ((240, 321), (240, 20)),
        ((99, 98), (7, 7)),
    ],
)
def test_resize_is_torchs_bit_for_bit(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    frames[0], frames[1] = 255, 0
    image = torch.from_numpy(frames).permute(0, 3, 1, 2)
    theirs = functional.interpolate(image, size=wanted, mode="bilinear", antialias=True)
    np.testing.assert_array_equal(resize(frames, *wanted), theirs.permute(0, 2, 3, 1).numpy())


def test_reproducible_videos_do_not_depend_on_what_was_written_before(tmp_path: Path) -> None:
    y, x = np.mgrid[:48, :80]
    wave = [np.stack([128 + 90 * np.sin((x + c * y + 3 * t) / 9) for c in range(3)], -1) for t in range(30)]
    images = np.stack(wave).round().astype(np.uint8)

    def written() -> bytes:
        with video.mp4_writer(tmp_path / "a.mp4", 5, reproducible=True) as add:
            for image in images:
                add(image)
        return (tmp_path / "a.mp4").read_bytes()

    first = written()
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (20, 48, 80, 3), dtype=np.uint8)
        video.write_mp4(tmp_path / "b.mp4", noise, 5)
        video.read_frames(tmp_path / "b.mp4", range(20))
        assert written() == first


def test_a_whole_file_is_counted_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video.write_mp4(path, numbered(40), 15, crf=1)
    for threads in (0, 1):
        assert rows(path, 40, [0, 30], threads=threads) == [0, 30]
    for count in (39, 41):
        with pytest.raises(PersistWorldError, match=f"it has 40 frames, the table {count} rows"):
            rows(path, count, [0, 30])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "a.mp4"
    video.write_mp4(whole, np.random.default_rng(0).integers(0, 256, (30, 48, 80, 3), dtype=np.uint8), 5)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path in (cut, tmp_path / "absent.mp4"):
        for call in (lambda p=path: video.read_frames(p, [25]), lambda p=path: video.count_frames(p)):
            with pytest.raises(PersistWorldError) as caught:
                call()
            assert caught.value.where == str(path)
    with pytest.raises(PersistWorldError, match="no frames to write"):
        video.write_mp4(tmp_path / "none.mp4", [], 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "cut.mp4"]


def test_a_file_damaged_in_the_middle_is_an_error_not_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video.write_mp4(path, np.random.default_rng(0).integers(0, 256, (30, 48, 80, 3), dtype=np.uint8), 5)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 3, len(data) // 2):
        data[at] = 0
    path.write_bytes(bytes(data))
    with pytest.raises(PersistWorldError):
        video.read_frames(path, range(30))
