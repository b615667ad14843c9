"""Where an image comes from, as XMP: that a model drew it, which one, and under which licence.

Search engines and photo libraries read the property of IPTC, people with any metadata viewer the
rest. The same image gives the same bytes: there are no times.

Source: IPTC Photo Metadata Standard 2025.1, Digital Source Type and AI properties; XMP part 1,
ISO 16684-1, serialised as RDF/XML in a packet. Left out: padding for tools that write in place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from xml.sax.saxutils import escape

import sensebatch

SOFTWARE = f"sensebatch {sensebatch.__version__}"
"""What drew the images, by name and version."""

_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = f"{_SOURCE_TYPES}trainedAlgorithmicMedia"
"""IPTC's word for an image that a model drew from text."""
DRAWN_FROM_IMAGES = f"{_SOURCE_TYPES}compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for one that a model made of other images."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNKNOWN = "\ufffd"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:sensebatch="urn:sensebatch:">
{properties}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def source_type(metadata: Mapping[str, Any]) -> str:
    """Returns the digital source type of an image.

    Args:
        metadata: Of `images.image_metadata`.
    """
    return DRAWN_FROM_IMAGES if metadata["input_sha256"] else DRAWN


def public_name(model: str) -> str:
    """Returns a model's name without the folders of this machine, which concern nobody else.

    Args:
        model: As the user named it: `tiny`, `owner/name` of the Hub, or a folder.
    """
    path = PurePath(model)
    is_hub_id = len(path.parts) == 2 and not path.anchor and not model.startswith((".", "~"))
    return model if is_hub_id else path.name or model


def xmp_packet(metadata: Mapping[str, Any]) -> bytes:
    """Returns the XMP that goes into an image.

    Args:
        metadata: Of `images.image_metadata`.
    """
    # Images of earlier versions name less.
    properties = {
        "xmp:CreatorTool": metadata.get("software"),
        "Iptc4xmpExt:DigitalSourceType": source_type(metadata),
        "Iptc4xmpExt:AISystemUsed": metadata.get("model"),
        "Iptc4xmpExt:AISystemVersionUsed": metadata["checkpoint"],
        "sensebatch:ModelLicense": metadata.get("model_license"),
    }
    lines = [
        f"<{name}>{escape(_NOT_XML.sub(_UNKNOWN, value))}</{name}>"
        for name, value in properties.items()
        if value is not None
    ]
    return _PACKET.format(properties="\n".join(lines)).encode()
