"""Reading, resizing and writing of video files.

Shapes: frames are uint8 RGB arrays (N, H, W, 3). Reading goes through PyAV (FFmpeg), so h264, AV1 and others work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from torch.nn import functional

from persistworld_cli.errors import PersistWorldError

Frames = NDArray[np.uint8]

# swscale's defaults round YUV <-> RGB down: a smooth picture comes back darker by 1 of 255 (42 dB). With these flags
# (PyAV 18 is the first to take them) its mean is right to 0.02 (52 dB).
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Below this many skipped frames decoding through is cheaper and safer than seeking.
_SEEK_THRESHOLD = 60


def count_frames(path: Path) -> int:
    """Number of frames the container of ``path`` declares (decoded and counted where it declares none).

    Raises:
        PersistWorldError: the file is missing or is no readable video.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            return stream.frames or sum(1 for _ in container.decode(stream))
    except (FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def iter_frames(path: Path, indices: Sequence[int]) -> Iterator[Frames]:
    """Yield the frames of strictly increasing ``indices`` as uint8 (H, W, 3), decoding forward once.

    A far first index (an episode inside a long LeRobot v3.0 file) is reached by a seek to the key frame before it.

    Raises:
        PersistWorldError: unreadable file, or it ends before the last index.
    """
    if not len(indices):
        return
    wanted = iter(indices)
    target = next(wanted)
    seen = -1
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stream.thread_type = "AUTO"
            for seen, frame in _numbered(container, stream, target):
                if seen > target:  # the key frame after the target: timestamps of this file cannot be trusted
                    raise _unreadable(path, ValueError(f"frame {target} has no place in its timestamps"))
                if seen < target:
                    continue
                if frame.is_corrupt:  # the decoder filled a damaged frame with guesses
                    raise _unreadable(path, ValueError(f"frame {seen} is damaged"))
                yield np.asarray(frame.to_ndarray(format="rgb24", interpolation=_EXACT), dtype=np.uint8)
                following = next(wanted, None)
                if following is None:
                    return
                target = following
    except (FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error
    raise PersistWorldError(
        f"video ends after {seen + 1} frames, frame {target} is wanted",
        where=str(path),
        fix="the file is cut short: download or record it again",
    )


def read_frames(path: Path, indices: Sequence[int]) -> Frames:
    """Frames of ``path`` at ``indices`` (any order, repeats allowed): uint8 (N, H, W, 3).

    Raises:
        PersistWorldError: as `iter_frames`; also for a negative index or no index at all.
    """
    if not len(indices) or min(indices) < 0:
        raise PersistWorldError(f"no frames {list(indices)[:8]}", where=str(path), fix="ask for frames from 0 on")
    unique = sorted({int(i) for i in indices})
    frames = np.stack(list(iter_frames(path, unique)))
    return frames[np.searchsorted(np.asarray(unique), np.asarray(indices, dtype=np.int64))]


def resize(frames: Frames, height: int, width: int) -> Frames:
    """Resize uint8 (N, H, W, 3) to (N, height, width, 3): bilinear with antialiasing (torch's, as PIL's BILINEAR).

    The aspect ratio is not kept: Ctrl-World's 180x320 -> 192x320 stretches too.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    picture = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    out = functional.interpolate(picture, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(out.permute(0, 2, 3, 1).numpy())


def write_mp4(path: Path, frames: Iterable[Frames], fps: float, *, crf: int = 18) -> int:
    """Write frames (H, W, 3) uint8 as h264 at ``fps``; returns how many. Written beside and renamed: whole or absent.

    An odd height or width is padded by repeating the last row or column (yuv420p has half-size colour planes).

    Raises:
        PersistWorldError: no frames, or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    written = 0
    try:
        with av.open(str(partial), "w") as container:
            stream = None
            for picture in frames:
                picture = np.ascontiguousarray(_even(picture))
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": str(crf), "preset": "medium"}
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation=_EXACT)))
                written += 1
            if stream is None:
                raise PersistWorldError("no frames to write", where=str(path), fix="give at least one frame")
            container.mux(stream.encode())
        partial.replace(path)
    except (FFmpegError, OSError) as error:
        raise PersistWorldError(f"cannot write video: {error}", where=str(path), fix="check disk and rights") from error
    finally:
        partial.unlink(missing_ok=True)
    return written


def _numbered(
    container: av.container.InputContainer, stream: av.VideoStream, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their numbers, starting at or before frame ``first``.

    From the file's start frames are counted (right for any timestamps); after a seek their number comes from the time.
    """
    rate, base = stream.average_rate, stream.time_base
    if first < _SEEK_THRESHOLD or rate is None or base is None:
        yield from enumerate(container.decode(stream))
        return
    origin = stream.start_time or 0
    container.seek(origin + int(first / rate / base), stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts is not None:
            yield round((frame.pts - origin) * base * rate), frame


def _even(picture: Frames) -> Frames:
    """Pad an odd picture (H, W, 3) to even sides by repeating its edge."""
    height, width = picture.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream, or an error naming the file."""
    if not container.streams.video:
        raise PersistWorldError("file has no video stream", where=str(path), fix="replace the file")
    return container.streams.video[0]


def _unreadable(path: Path, error: Exception) -> PersistWorldError:
    """The one error for a video that cannot be decoded."""
    reason = "file is missing" if not path.exists() else f"cannot decode video: {error}"
    return PersistWorldError(reason, where=str(path), fix="the file is absent, cut short or damaged: fetch it again")
