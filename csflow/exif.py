"""When a photograph was taken, as its camera has written into the file."""

from datetime import UTC, datetime

from PIL import ExifTags, Image

FORM = "%Y:%m:%d %H:%M:%S"


def taken_at(image: Image.Image) -> datetime | None:
    """EXIF's DateTimeOriginal in UTC; None if the file has none, or it is damaged.

    EXIF knows the offset to UTC only where cameras write it (OffsetTimeOriginal, since EXIF 2.31). Without it
    the camera's clock counts as UTC, as in archives.
    """
    try:
        tags = image.getexif().get_ifd(ExifTags.IFD.Exif)
        text = tags.get(ExifTags.Base.DateTimeOriginal)
        if not text:
            return None
        taken = datetime.strptime(_plain(text), FORM).replace(tzinfo=UTC)
        return _in_utc(taken, tags.get(ExifTags.Base.OffsetTimeOriginal))
    except Exception:  # the EXIF parser lets many types through, and cameras write all kinds of text
        return None


def _in_utc(taken: datetime, offset: object) -> datetime:
    try:
        zone = datetime.strptime(_plain(offset), "%z").tzinfo
    except ValueError:
        return taken
    return taken.replace(tzinfo=zone).astimezone(UTC)


def _plain(text: object) -> str:
    return str(text).rstrip("\0 ")
