"""Reading and writing of video files; without torch, so that a decoding process need not load it.

Shapes: frames are uint8 RGB arrays (N, H, W, 3). Reading goes through PyAV (FFmpeg), so h264, AV1 and others work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file

Frames = NDArray[np.uint8]

# swscale's defaults round YUV <-> RGB down: a smooth image comes back darker by 1 of 255 (42 dB). With these flags
# (PyAV 18 is the first to take them) its mean is right to 0.02 (52 dB).
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Below this many skipped frames decoding through is cheaper and safer than seeking.
_SEEK_THRESHOLD = 60


def count_frames(path: Path) -> int:
    """Number of frames the container declares (decoded and counted where it declares none). Raises as `iter_frames`."""
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            return stream.frames or sum(1 for _ in container.decode(stream))
    except PersistWorldError:
        raise
    except Exception as error:  # FFmpegError, and what PyAV raises for values that no video has
        raise _unreadable(path, error) from error


def iter_frames(path: Path, indices: Sequence[int], *, threads: int = 0, whole: int = 0) -> Iterator[Frames]:
    """Yield the frames of strictly increasing ``indices`` as uint8 (H, W, 3), decoding forward once.

    A far first index (an episode inside a long LeRobot v3.0 file) is reached by a seek to the key frame before it.

    Args:
        path: the video.
        indices: frame numbers.
        threads: of the decoder; 0: as FFmpeg chooses.
        whole: read to the end after the last index, and expect this many frames in all. A decoder may silently drop a
            damaged frame; all later ones would then be one place too early.

    Raises:
        PersistWorldError: unreadable file, a damaged frame before the last index, or the file ends before it.
    """
    if not len(indices):
        return
    wanted = iter(indices)
    target: int | None = next(wanted)
    seen, sound = -1, False
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stream.thread_type = "AUTO" if threads != 1 else "NONE"
            if threads:
                stream.codec_context.thread_count = threads
            for seen, frame in _numbered(container, stream, int(indices[0])):
                sound = sound or frame.key_frame  # after a seek, frames before the key frame lack what they build on
                if frame.is_corrupt and (sound or seen == target):  # the decoder filled a damaged frame with guesses
                    raise _unreadable(path, ValueError(f"frame {seen} is damaged"))
                if target is None or seen < target:
                    continue
                if seen > target:  # the key frame after the target: timestamps of this file cannot be trusted
                    raise _unreadable(path, ValueError(f"no timestamp for frame {target}"))
                yield np.asarray(frame.to_ndarray(format="rgb24", interpolation=_EXACT), dtype=np.uint8)
                target = next(wanted, None)
                if target is None and not whole:
                    return
    except PersistWorldError:
        raise
    except Exception as error:  # as in `count_frames`
        raise _unreadable(path, error) from error
    if target is not None or seen + 1 != whole:
        expected = f"frame {target} is wanted" if target is not None else f"{whole} are declared"
        raise PersistWorldError(
            f"video ends after {seen + 1} frames, {expected}",
            where=str(path),
            fix="the file is cut short or damaged: download or record it again",
        )


def read_frames(path: Path, indices: Sequence[int]) -> Frames:
    """Frames of ``path`` at ``indices`` (any order, repeats allowed): uint8 (N, H, W, 3).

    Raises:
        PersistWorldError: as `iter_frames`; also for a negative index or no index at all.
    """
    if not len(indices) or min(indices) < 0:
        raise PersistWorldError(
            f"cannot read frames {list(indices)[:8]}", where=str(path), fix="give numbers from 0 on"
        )
    unique = sorted({int(i) for i in indices})
    frames = np.stack(list(iter_frames(path, unique)))
    return frames[np.searchsorted(np.asarray(unique), np.asarray(indices, dtype=np.int64))]


@contextmanager
def mp4_writer(
    path: Path, fps: float, *, crf: int = 18, reproducible: bool = False
) -> Iterator[Callable[[Frames], None]]:
    """A function that appends frames (H, W, 3) uint8 to an h264 video; the file is written whole or not at all.

    An odd height or width is padded by repeating the last row or column (yuv420p has half-size colour planes).

    Args:
        path: the file.
        fps: frames per second.
        crf: quality of x264, lower is better.
        reproducible: the same images give the same bytes. It uses one thread, because x264's output depends on their
            number, and no macroblock tree, whose assembly code reads memory left by earlier videos (x264 165).

    Raises:
        CannotWrite: the file cannot be written.
        PersistWorldError: no frames were given.
    """
    with whole_file(path) as partial, _as_oserror(), av.open(str(partial), "w", format="mp4") as container:
        streams: list[av.VideoStream] = []  # one, once the size is known

        def add(image: Frames) -> None:
            with _as_oserror():
                image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
                if not streams:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width = image.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": str(crf), "preset": "medium", **({"mbtree": "0"} if reproducible else {})}
                    if reproducible:
                        stream.codec_context.thread_count = 1
                    streams.append(stream)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(streams[0].encode(frame.reformat(format="yuv420p", interpolation=_EXACT)))

        yield add
        if not streams:
            raise PersistWorldError("no frames to write", where=str(path), fix="give at least one frame")
        container.mux(streams[0].encode())


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Turn FFmpeg's errors into OSError; not all of them are one."""
    try:
        yield
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error


def write_mp4(path: Path, frames: Iterable[Frames], fps: float, *, crf: int = 18) -> None:
    """Write all ``frames`` by an `mp4_writer`."""
    with mp4_writer(path, fps, crf=crf) as add:
        for image in frames:
            add(image)


def _numbered(
    container: av.container.InputContainer, stream: av.VideoStream, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their numbers, starting at or before frame ``first``.

    Without a seek, frames are counted (right for any timestamps); after one, their number comes from the timestamp.
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


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The first video stream, or an error naming the file."""
    if not container.streams.video:
        raise PersistWorldError("file has no video stream", where=str(path), fix="replace the file")
    return container.streams.video[0]


def _unreadable(path: Path, error: Exception) -> PersistWorldError:
    """The one error for a video that cannot be decoded."""
    if not path.is_file():
        reason = "file is missing"
    elif not path.stat().st_size:
        reason = "file is empty"
    else:  # FFmpeg's errors repeat their number and the path
        reason = f"cannot decode video: {getattr(error, 'strerror', None) or error}"
    return PersistWorldError(reason, where=str(path), fix="the file is absent, cut short or damaged: fetch it again")
