"""The report job: reads the archive, decides what is on the defect list, draws, and writes one page."""

from csflow import console
from csflow.errors import ExitStatus
from csflow.report import charts
from csflow.report.archive import Archive, open_archive
from csflow.report.config import ReportConfig
from csflow.report.defects import DefectList, check_target, make_list, write_list
from csflow.report.gallery import make_gallery
from csflow.report.page import Page, render
from csflow.storage import Location


def report(config: ReportConfig) -> ExitStatus:
    """Writes the page to `--output` and the defect list to `--defects`."""
    output = Location(config.output, config.storage_options)
    output.parent.check_writable()
    target = Location(config.defects, config.storage_options) if config.defects else None
    check_target(target)
    archive = open_archive(config)
    defects = make_list(archive, config.false_discovery_rate, config.estimate)
    page = _draw(config, archive, defects)
    output.write(render(page).encode())
    print(
        f"{config.output}: {len(archive.images):,} images scored, the {len(page.cards)} most anomalous shown"
    )
    if target:
        write_list(archive, defects, target)
        print(f"{config.defects}: {defects.images:,} images")
    print(defects.promise)
    if defects.doubt:
        console.warn(defects.doubt)
    return ExitStatus.DONE


def _draw(config: ReportConfig, archive: Archive, defects: DefectList) -> Page:
    images = archive.images
    cards, colours = make_gallery(archive, defects.is_chosen, config)
    scores, flagged = images["anomaly_score"].to_numpy(), images["is_anomalous"].to_numpy()
    return Page(
        archive,
        defects,
        cards,
        colours,
        charts.histogram(scores, flagged, archive.calibration.anomaly_score if archive.calibration else None),
        charts.time_line(images),
        *charts.folders(images, defects.is_chosen),
        charts.heat_map(archive.scores),
    )
