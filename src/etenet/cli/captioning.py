"""`etenet caption`: its flags, and the job that they describe. Imports torch only for a job that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from etenet.captioning.options import OPTIONS, CaptionOptions
from etenet.cli import arguments
from etenet.errors import UsageError
from etenet.files import require_replaceable
from etenet.jobs.formats import FORMATS, REPORT, Format, format_for, journal_of
from etenet.jobs.report import THUMBNAIL_PX

if TYPE_CHECKING:
    from etenet.jobs.inputs import JobClip
    from etenet.jobs.journal import Job, Record
    from etenet.jobs.remote import Publication
    from etenet.jobs.run import Engine, OnSegments


def caption(options: argparse.Namespace) -> int:
    from etenet.jobs import inputs, remote, run, watch
    from etenet.jobs.progress import say
    from etenet.serving import archive

    _check_engine(options)
    options.checkpoint = options.checkpoint or options.default_checkpoint
    texts = {option.name: getattr(options, option.name) for option in OPTIONS if option.is_flag}
    caption_options = CaptionOptions.parse({name: text for name, text in texts.items() if text is not None})
    if options.follow and options.engine:
        raise UsageError("--follow needs the captions in order, which Ray does not give; leave one of the two out")
    options.out = None if options.out == inputs.STANDARD_INPUT else options.out
    report = _report(options)
    out, publication = remote.destination(options.out) if options.out else (None, None)
    if publication and publication.url in options.paths:
        raise _would_replace(options.out)
    format = format_for(options.format, out, segments=caption_options.cut.into_segments)
    journal = journal_of(out, format) if out else None
    if report and os.path.realpath(report) in (path and os.path.realpath(path) for path in (out, journal)):
        raise UsageError(f"--report would replace {report}, which has the captions; name another file with --report")
    skipped, watched = inputs.Skipped(), None
    if options.watch:
        _check_watch(options, out, format)
        watched, clips = watch.Watch(options.paths), []
    else:
        sample = (options.sample, options.seed or 0) if options.sample else None
        clips = inputs.clips(
            _inputs(options.paths, out, journal, report),
            sample=sample,
            shard=options.shard,
            skipped=skipped,
            but=_written(out, journal, report, publication, format),
        )
    about = "; ".join(filter(None, (f"skipping {skipped}" if str(skipped) else "", _by(options))))
    with archive.opened(options.checkpoint) as (options.checkpoint, options.encoder_graph):
        job = _job(options, caption_options)
        if report or format.pictures:
            caption_options = replace(caption_options, thumbnails=THUMBNAIL_PX)
        summary = run.run(
            clips,
            _engine(options, caption_options, job),
            out=out,
            format=format,
            publication=publication,
            report=report,
            job=job,
            about=about,
            in_order=options.in_order,
            retry_failed=options.retry_failed,
            overwrite=options.overwrite,
            watch=watched,
            follow=options.follow,
        )
    say(str(summary))
    return 1 if summary.failed or summary.failed_before else 0


def _check_engine(options: argparse.Namespace) -> None:
    """Raises `UsageError` for a flag that would change nothing."""
    if options.server and options.engine:
        raise UsageError("--server and --engine ray each caption; leave one of the two out")
    if options.server and options.checkpoint:
        raise UsageError("--server captions with its own checkpoint; leave out --checkpoint")
    if options.ray_address and not options.engine:
        raise UsageError("--ray-address is for --engine ray; give that too")
    if options.workers and not (options.server or options.engine):
        raise UsageError("--workers is for --server and --engine ray; here, ETENET_CORES says how many cores are used")
    if options.seed is not None and not options.sample:
        raise UsageError("--seed is for --sample; give that too")
    if options.retry_failed and not options.out:
        raise UsageError("--retry-failed continues the file of an earlier run; name it with --out")


def _inputs(paths: list[str], out: Path | None, journal: Path | None, report: Path | None) -> list[str]:
    """The paths without what an earlier run wrote, which a pattern of the shell matches the next time.

    Raises `UsageError` for an output that may be the user's own list.
    """
    others = [path for path in paths if not _is_same(path, report)]
    clips = [path for path in others if not _is_same(path, journal)]
    if any(_is_same(path, out) for path in clips) or (others and not clips):
        raise _would_replace(out)
    return clips


def _would_replace(out: object) -> UsageError:
    return UsageError(f"--out would replace {out}, which is to be captioned; name another file with --out")


def _is_same(path: str, written: Path | None) -> bool:
    return written is not None and written.is_file() and os.path.realpath(path) == os.path.realpath(written)


def _written(
    out: Path | None, journal: Path | None, report: Path | None, publication: Publication | None, format: Format
) -> list[str]:
    """What an earlier run wrote, as a pattern that etenet expands finds it.

    Without shards: among clips these are the user's own, and `run` refuses to replace them.
    """
    at_out = [path for path in (journal, None if format.shards else out) if path]
    names = [publication.place_of(path.name) if publication else str(path) for path in at_out]
    return names + ([str(report)] if report else [])


def _check_watch(options: argparse.Namespace, out: Path | None, format: Format) -> None:
    """Raises `UsageError` for what needs all clips before the first."""
    given = {"--in-order": options.in_order, "--sample": options.sample, "--shard": options.shard != (1, 1)}
    if needing_all := [flag for flag, wanted in given.items() if wanted]:
        raise UsageError(
            f"{needing_all[0]} needs all clips before the first, and --watch waits for more; leave one out"
        )
    if options.engine == "ray":
        raise UsageError("--watch captions in this process or by a --server; leave out --engine ray")
    if not options.out and not format.lines:
        raise UsageError(f"--watch prints lines; for {format.name}, name a file with --out")
    if format.file_per_video and Path(options.out).suffix.lower() == format.suffix:
        raise UsageError(f"{options.out} is one file, and further videos arrive; name a folder with --out")
    if format.shards and out and _is_below(out, options.paths):
        raise UsageError(f"{options.out} would arrive in a folder that is watched; name another place with --out")


def _is_below(path: Path, folders: Sequence[str]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def _report(options: argparse.Namespace) -> Path | None:
    """The report beside another output. Without one, the report is the output."""
    report: Path | None = options.report
    if report is None or options.out:
        if report:
            if not report.parent.is_dir():
                raise UsageError(f"no folder for {report}; make the folder, or give another path with --report")
            require_replaceable(report)
        return report
    if options.format not in (None, REPORT.name):
        raise UsageError(f"--report stands beside the {options.format} file of --out; name that too")
    options.out, options.format = str(report), REPORT.name
    return None


def _by(options: argparse.Namespace) -> str:
    if options.server:
        return f"asking {options.server}"
    return f"loading {options.checkpoint}{' on Ray' if options.engine == 'ray' else ''}"


def _job(options: argparse.Namespace, caption_options: CaptionOptions) -> Job:
    """What the captions depend on, found out before anything large is loaded. Raises `EtenetError` if it cannot be."""
    from etenet.jobs.journal import Job

    if options.server:
        from etenet.jobs.engines import server

        checkpoint, precision = server.checkpoint_of(options.server)
    else:
        from etenet.model import checkpoint as checkpoints
        from etenet.serving import archive

        inspected = checkpoints.inspect(options.checkpoint)
        if refusal := caption_options.refusal(inspected.confidence):
            raise refusal
        checkpoint = inspected.id
        precision = archive.about(options.encoder_graph.parent).precision if options.encoder_graph else ""
    details = {"probabilities": "true"} if _wants_details(options, caption_options) else {}
    cheaper = {"precision": precision} if precision == "int8" else {}
    return Job(checkpoint=checkpoint, settings=caption_options.as_texts() | details | cheaper)


def _wants_details(options: argparse.Namespace, caption_options: CaptionOptions) -> bool:
    return options.probabilities or caption_options.captions > 1


def _engine(options: argparse.Namespace, caption_options: CaptionOptions, job: Job) -> Engine:
    """The engine that is asked for. What it needs is loaded when it gets its clips."""
    details = _wants_details(options, caption_options)
    if options.server:
        from etenet.jobs.engines import server

        return server.engine(
            options.server,
            caption_options,
            details=details,
            in_flight=options.workers or server.IN_FLIGHT,
            checkpoint=job.checkpoint,
        )
    if options.engine == "ray":
        try:
            from etenet.jobs.engines import ray
        except ModuleNotFoundError as error:
            raise UsageError(f"--engine ray needs the extra: pip install 'etenet[ray]' ({error})") from error

        return ray.engine(
            options.checkpoint,
            caption_options,
            details=details,
            address=options.ray_address,
            actors=options.workers,
        )
    from etenet.jobs.engines import local

    load = partial(
        local.engine,
        options.checkpoint,
        caption_options,
        details=details,
        soon=options.follow,
        encoder_graph=options.encoder_graph,
    )
    if options.watch:
        load_for_more = cache(partial(load, clips=sys.maxsize))
        return lambda clips, on_segments: load_for_more()(clips, on_segments)

    def load_and_caption(clips: Iterable[JobClip], on_segments: OnSegments) -> Iterator[Record]:
        todo = list(clips)
        return load(clips=len(todo))(todo, on_segments)

    return load_and_caption


def add_flags(command: argparse.ArgumentParser, checkpoint: Path) -> None:
    command.add_argument(
        "paths",
        nargs="+",
        type=arguments.text,
        metavar="PATH",
        help="files, folders, globs, tars of samples; lists of clips as .jsonl, .csv or .txt, or - for one on standard "
        "input",
    )
    command.add_argument(
        "--out",
        type=arguments.text,
        metavar="F",
        help="a file, a folder for subtitles, or a URL of one; default, and -: standard output. Clips that it already "
        "has are skipped",
    )
    command.add_argument("--format", choices=FORMATS, help="default: from the name of --out")
    command.add_argument(
        "--report",
        type=arguments.path,
        metavar="F.html",
        help="also write a page that shows all clips with their captions",
    )
    command.add_argument(
        "--follow",
        action="store_true",
        help="print each segment as soon as it has a caption: JSON lines, or text with --format text",
    )
    command.add_argument("--overwrite", action="store_true", help="forget the captions that --out already has")
    command.add_argument("--in-order", action="store_true", help="write in the order of the input")
    command.add_argument("--retry-failed", action="store_true", help="try clips again that failed in an earlier run")
    command.add_argument(
        "--shard", type=arguments.shard, default=(1, 1), metavar="I/N", help="only every N-th clip, from the I-th"
    )
    command.add_argument(
        "--sample", type=arguments.count, metavar="N", help="only N of the clips, at random, but always the same"
    )
    command.add_argument("--seed", type=arguments.whole, metavar="N", help="which clips --sample takes; default 0")
    command.add_argument(
        "--watch", action="store_true", help="caption what arrives in folders, too, until Ctrl-C or SIGTERM"
    )
    command.add_argument(
        "--checkpoint",
        type=arguments.path,
        metavar="F.pt",
        help=f"a checkpoint, or an archive (F.mar), which is ready sooner; default: {checkpoint}",
    )
    command.set_defaults(default_checkpoint=checkpoint)
    command.add_argument(
        "--server",
        type=arguments.text,
        metavar="URL",
        help="caption through this server, such as http://localhost:8080, instead of in this process; "
        "ETENET_SERVER_KEY is its key",
    )
    command.add_argument("--engine", choices=("ray",), help="caption on a Ray cluster")
    command.add_argument(
        "--ray-address",
        type=arguments.text,
        metavar="ADDRESS",
        help="address of the Ray cluster; default: RAY_ADDRESS, or one that runs on this machine, or a new one there",
    )
    command.add_argument(
        "--workers",
        type=arguments.count,
        metavar="N",
        help="requests in flight (--server, default 8) or actors (--engine ray, default: one per GPU, or per node)",
    )
    command.add_argument(
        "--probabilities", action="store_true", help="also write the probabilities of sentences and words"
    )
    for option in OPTIONS:
        if option.is_flag:
            metavar = None if option.choices else "X" if option.kind is float else "N"
            command.add_argument(option.flag, choices=option.choices or None, metavar=metavar, help=option.usage)
