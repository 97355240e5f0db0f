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

from persistworld_cli.data.raw.clock import Clock
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file

Frames = NDArray[np.uint8]

# swscale's defaults round YUV <-> RGB down: a smooth image comes back darker by 1 of 255 (42 dB). With these flags
# (PyAV 18 is the first to take them) its mean is right to 0.02 (52 dB).
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

_SEEK_S = 4.0  # seconds: to a nearer start, decoding is cheaper and safer than seeking
_ROUNDING = 2e-4  # seconds: timestamps are float32
_CUT = "the file is cut short or damaged: download or record it again"
TIMES_FIX = "correct the timestamps or the video, or leave the episode out"


def count_frames(path: Path) -> int:
    """Number of frames the container declares (decoded and counted where it declares none). Raises as `read_frames`."""
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            return stream.frames or sum(1 for _ in container.decode(stream))
    except PersistWorldError:
        raise
    except Exception as error:  # FFmpegError, and what PyAV raises for values that no video has
        raise _unreadable(path, error) from error


def read_frames(path: Path, indices: Sequence[int]) -> Frames:
    """Frames of ``path`` by number (any order, repeats allowed): uint8 (N, H, W, 3).

    Raises:
        PersistWorldError: unreadable file, a damaged frame before the last index, the file ends before it, a negative
            index or no index at all.
    """
    if not len(indices) or min(indices) < 0:
        raise PersistWorldError(
            f"cannot read frames {list(indices)[:8]}", where=str(path), fix="give numbers from 0 on"
        )
    unique, seen = sorted({int(i) for i in indices}), -1
    frames: list[Frames] = []
    for seen, (frame, _) in enumerate(_decoded(path, 0)):
        _require_sound(path, frame, seen)
        if seen == unique[len(frames)]:
            frames.append(_pixels(frame))
            if len(frames) == len(unique):
                return np.stack(frames)[np.searchsorted(np.asarray(unique), np.asarray(indices, dtype=np.int64))]
    raise PersistWorldError(
        f"video ends after {seen + 1} frames, frame {unique[len(frames)]} is wanted", where=str(path), fix=_CUT
    )


def iter_rows(
    path: Path, clock: Clock, rows: Sequence[int], *, name: str, begin: float | None = None, threads: int = 0
) -> Iterator[Frames]:
    """Yield the frames of some rows of an episode as uint8 (H, W, 3), decoding forward once.

    Each row must have a frame of its own, at most half a frame away from it in time: then its frame is the nearest one.
    An episode far inside a long LeRobot v3.0 file is reached by a seek to the key frame before it.

    Args:
        path: the video.
        clock: times of all rows.
        rows: numbers of the rows to yield, ascending; repeats allowed.
        name: of the camera and the episode, for messages.
        begin: time of the first row in the file, seconds; None: the file holds this episode alone and begins with it.
        threads: of the decoder; 0: as FFmpeg chooses.

    Raises:
        PersistWorldError: unreadable file, a damaged frame, another number of frames than rows, or other times.
    """
    alone, half, seen = begin is None, 0.5 * clock.spacing + _ROUNDING, 0
    wanted = iter(rows)
    target = next(wanted, None)
    for frame, sound in _decoded(path, threads, 0.0 if begin is None else begin - half):
        if frame.time is None:
            raise _unreadable(path, ValueError("its frames have no timestamps"))
        begin = frame.time if begin is None else begin
        time = frame.time - begin
        if time >= -half and seen < len(clock.times) and abs(time - clock.times[seen]) > half:
            raise PersistWorldError(
                f"{name}: frame {seen} is at {time:.3f} s in the video, at {clock.times[seen]:.3f} s by {clock.source}",
                where=str(path),
                fix=TIMES_FIX,
            )
        if sound or time >= -half:  # after a seek, frames before the key frame lack what they build on
            _require_sound(path, frame, seen)
        if time < -half:
            continue
        if target == seen:
            image = _pixels(frame)
            while target == seen:
                yield image
                target = next(wanted, None)
        seen += 1
        if seen == len(clock.times) and not alone:
            return
    if seen != len(clock.times):
        raise PersistWorldError(
            f"{name} has {seen} frames, the table {len(clock.times)} rows", where=str(path), fix=_CUT
        )


def _pixels(frame: av.VideoFrame) -> Frames:
    """A decoded frame as uint8 RGB (H, W, 3)."""
    return np.asarray(frame.to_ndarray(format="rgb24", interpolation=_EXACT), dtype=np.uint8)


def _require_sound(path: Path, frame: av.VideoFrame, number: int) -> None:
    """Raise if the decoder filled a damaged frame with guesses."""
    if frame.is_corrupt:
        raise _unreadable(path, ValueError(f"frame {number} is damaged"))


def _decoded(path: Path, threads: int, begin: float = 0.0) -> Iterator[tuple[av.VideoFrame, bool]]:
    """The frames of a video, and whether a key frame has come; a far ``begin`` (s) is reached by a seek before it."""
    sound = False
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stream.thread_type = "AUTO" if threads != 1 else "NONE"
            if threads:
                stream.codec_context.thread_count = threads
            if begin > _SEEK_S and stream.time_base is not None:
                container.seek(int(begin / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                sound = sound or frame.key_frame
                yield frame, sound
    except PersistWorldError:
        raise
    except Exception as error:  # as in `count_frames`
        raise _unreadable(path, error) from error


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
