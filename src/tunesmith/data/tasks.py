"""Demonstration tasks made at run time from tables that PyPI packages hold: real work, known answers, no download.

    legal_citations      a case as people jot it down   -> its Bluebook citation           (reporters-db, courts-db)
    icd10cm_chapters     a diagnosis as it is worded    -> title of its ICD-10-CM chapter  (simple-icd-10-cm)
    botocore_calls       what an AWS call does          -> service.method                  (botocore)
    sentiment_pairs      a prompt                       -> a positive over a negative sentence  (sentiment.py)
    sentiment_sentences  a prompt                       -> a positive or a negative sentence    (sentiment.py)
    sentiment_labels     a sentence                     -> positive or negative                 (sentiment.py)

Tables are real, cases are not: parties, volumes and pages are drawn. Rows depend only on the seed and the packages.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RecipeError
from ..types import Conversation, Row
from .layout import content_id, plain_row
from .sentiment import PARTS, sentiment_labels, sentiment_pairs, sentiment_sentences
from .surnames import SURNAMES

T = TypeVar("T")

TASKS = (
    *("legal_citations", "icd10cm_chapters", "botocore_calls"),
    *("sentiment_pairs", "sentiment_sentences", "sentiment_labels"),
)
DEFAULT_ROWS = 3000


def builtin(name: str, rows: int | None, seed: int) -> Iterator[Row]:
    """Rows of a built-in task, at most `rows` of them; unless given, 3000, or all of a sentiment task's part.

    `sentiment_pairs/test` is the part test of that task, and without a slash its part train. Raises RecipeError for an
    unknown name or a missing package, DataError where sentiment ratings can be neither found nor downloaded.
    """
    task, slash, part = name.partition("/")
    match task if not slash or part in PARTS else "":
        case "legal_citations" if not slash:
            return legal_citations(rows or DEFAULT_ROWS, seed)
        case "icd10cm_chapters" if not slash:
            return icd10cm_chapters(rows or DEFAULT_ROWS, seed)
        case "botocore_calls" if not slash:
            return botocore_calls(rows or DEFAULT_ROWS, seed)
        case "sentiment_pairs":
            return sentiment_pairs(part or "train", rows, seed)
        case "sentiment_sentences":
            return sentiment_sentences(part or "train", rows, seed)
        case "sentiment_labels":
            return sentiment_labels(part or "train", rows, seed)
        case _:
            near = get_close_matches(name, TASKS, n=1, cutoff=0.3)
            guess = f"Did you mean builtin:{near[0]}? " if near else ""
            known = ", ".join(TASKS)
            parts = "The sentiment tasks have the parts NAME, NAME/valid and NAME/test."
            raise RecipeError(f"no built-in task {name!r}", where="data", fix=f"{guess}There are: {known}. {parts}")


# --- legal citations -------------------------------------------------------------------------------------------------

# The states whose courts each of West's regional reporters covers.
_REGIONS: dict[str, tuple[str, ...]] = {
    "A.": (
        "Connecticut",
        "Delaware",
        "Maine",
        "Maryland",
        "New Hampshire",
        "New Jersey",
        "Pennsylvania",
        "Rhode Island",
        "Vermont",
    ),
    "N.E.": ("Illinois", "Indiana", "Massachusetts", "New York", "Ohio"),
    "N.W.": ("Iowa", "Michigan", "Minnesota", "Nebraska", "North Dakota", "South Dakota", "Wisconsin"),
    "P.": (
        "Alaska",
        "Arizona",
        "California",
        "Colorado",
        "Hawaii",
        "Idaho",
        "Kansas",
        "Montana",
        "Nevada",
        "New Mexico",
        "Oklahoma",
        "Oregon",
        "Utah",
        "Washington",
        "Wyoming",
    ),
    "S.E.": ("Georgia", "North Carolina", "South Carolina", "Virginia", "West Virginia"),
    "S.W.": ("Arkansas", "Kentucky", "Missouri", "Tennessee", "Texas"),
    "So.": ("Alabama", "Florida", "Louisiana", "Mississippi"),
}
_SUPREME = ("U.S.", "S. Ct.", "L. Ed.")
_FEDERAL = {
    "F.": re.compile(r"(\w+|D\.C\.) Cir\."),
    "F. Supp.": re.compile(r"(?!.*Cir)([NSEWCM]\.)?D\..*"),
    "B.R.": re.compile(r"Bankr\. ([NSEWCM]\.)?D\..*"),
}
_STATE_COURT = re.compile(
    r"Supreme (Judicial )?Court|Courts? of (Civil |Criminal |Special )?Appeals?|Appellate Court|Appeals Court"
    r"|District Courts of Appeal|Commonwealth Court|Superior Court of Pennsylvania"
)
# Bluebook table T10 leaves these names whole.
_WELL_FORMED = re.compile(r"((?<!Term)\.|Alaska|Guam|Idaho|Iowa|Ohio|Utah)$")
_DIRECTIONS = {"N": "Northern", "S": "Southern", "E": "Eastern", "W": "Western", "C": "Central", "M": "Middle"}
_LAST_YEAR = 2024
_NATION = "United States"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Court:
    citation: str
    names: tuple[str, ...]
    years: range


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edition:
    citation: str
    spellings: tuple[str, ...]
    years: range
    courts: tuple[_Court, ...]


def legal_citations(rows: int, seed: int) -> Iterator[Conversation]:
    """Jotted case references and their Bluebook citations; parties are surnames or the United States.

    `extra` holds the parts: parties, volume, reporter, spelling, page, court, year. Prompts are distinct.
    Raises RecipeError when reporters-db or courts-db is missing.
    """
    try:
        from courts_db import courts
        from reporters_db import REPORTERS
    except ImportError:
        raise _missing("legal_citations", "reporters-db and courts-db") from None
    editions = _editions(REPORTERS, courts)
    draw = random.Random(f"legal_citations {seed}")  # noqa: S311
    seen: set[str] = set()
    while len(seen) < rows:
        edition = draw.choice(editions)
        court = draw.choice(edition.courts)
        years = _overlap(edition.years, court.years)
        parts = {
            "parties": _parties(draw),
            # The first volumes of a fourth series are few; elsewhere hundreds stand on the shelf.
            "volume": draw.randint(1, 120 if edition.citation == "F.4th" else 600),
            "reporter": edition.citation,
            "spelling": draw.choice(edition.spellings),
            "page": draw.randint(1, 1500),
            "court": court.citation,
            "year": draw.choice(years),
        }
        prompt = _jotted(parts, draw.choice(court.names), draw)
        if prompt not in seen:
            seen.add(prompt)
            yield plain_row(prompt, _citation(parts), f"builtin:legal_citations:{len(seen)}", parts)


def _citation(parts: Mapping[str, Any]) -> str:
    when = f"{parts['court']} {parts['year']}".strip()
    a, b = parts["parties"]
    return f"{a} v. {b}, {parts['volume']} {parts['reporter']} {parts['page']} ({when})."


def _jotted(parts: Mapping[str, Any], court: str, draw: random.Random) -> str:
    """The same case as people write it down: any case, any separator, any order after the names."""
    a, b = (party + " of America" if party == _NATION else party for party in parts["parties"])
    if draw.random() < 0.2:
        a, b = a.upper(), b.upper()
    volume, spelling, page = parts["volume"], parts["spelling"], parts["page"]
    cited = draw.choices(
        (
            f"{volume} {spelling} {page}",
            f"{spelling} volume {volume} page {page}",
            f"vol. {volume}, {spelling}, p. {page}",
        ),
        weights=(3, 1, 1),
    )[0]
    fields = [cited, court, str(parts["year"])]
    if draw.random() < 0.6:
        draw.shuffle(fields)
    versus = draw.choice(("v", "v.", "V.", "vs.", "versus", "against"))
    return draw.choice((", ", "; ", " | ", "\n")).join([f"{a} {versus} {b}", *fields])


def _parties(draw: random.Random) -> tuple[str, str]:
    a, b = draw.sample(SURNAMES, 2)
    if draw.random() < 0.15:
        return (_NATION, b) if draw.random() < 0.5 else (a, _NATION)
    return a, b


def _editions(reporters: Any, courts: Any) -> list[_Edition]:
    editions = []
    for family in (*_SUPREME, *_FEDERAL, *_REGIONS):
        entry = reporters[family][0]
        sitting = _courts_of(family, courts)
        for citation, dates in entry["editions"].items():
            first, last = dates["start"].year, dates["end"].year if dates["end"] else _LAST_YEAR
            spellings = [spelling for spelling, meant in entry["variations"].items() if meant == citation]
            years = range(first, min(last, _LAST_YEAR) + 1)
            able = tuple(court for court in sitting if _overlap(court.years, years))
            editions.append(
                _Edition(citation=citation, spellings=(citation, *sorted(spellings)), years=years, courts=able)
            )
    return editions


def _courts_of(family: str, courts: Any) -> list[_Court]:
    """The courts that a reporter prints, with the names people give them."""
    chosen = []
    for court in courts:
        citation, place = court["citation_string"] or "", court["location"]
        if family in _SUPREME:
            fits = court["id"] == "scotus"
        elif family in _FEDERAL:
            fits = court["system"] == "federal" and _FEDERAL[family].fullmatch(citation)
        else:
            state = court["system"] == "state" and court["type"] == "appellate" and place in _REGIONS[family]
            fits = state and _STATE_COURT.search(court["name"])
        years = _sitting(court)
        if fits and years and (family in _SUPREME or _WELL_FORMED.search(citation)):
            # The Supreme Court is told by its reporters, so its citation names no court.
            cited = "" if family in _SUPREME else citation.replace("3rd", "3d").replace("Penn.", "Pa.")
            chosen.append(_Court(citation=cited, names=_names(court, family), years=years))
    return chosen


def _sitting(court: Mapping[str, Any]) -> range:
    """Years in which the court sat, as far as the table knows; of several spells the one that still lasts."""
    for dates in court["dates"]:
        if dates["end"] is None:
            return range(int((dates["start"] or "1789")[:4]) + 1, _LAST_YEAR + 1)
    return range(0)


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _names(court: Mapping[str, Any], family: str) -> tuple[str, ...]:
    """The official name and those real variants that still tell this court from its neighbours."""
    name, place = court["name"], court["location"]
    if family in ("F. Supp.", "B.R."):
        bench = "Bankruptcy" if family == "B.R." else "District"
        towards = [f"{direction} " for direction in _directions(name)]
        of = f"{''.join(towards)}District of {place}"
        names = [f"United States {bench} Court for the {of}", f"U.S. {bench} Court, {of}"]
        return (name, *names) if bench in name and place in name else tuple(names)
    names = [name]
    for example in court["examples"]:
        # Some variants in the table are patterns, some join two courts, some have lost the state.
        usable = re.fullmatch(r"[A-Za-z .]{1,80}", example) and "Division" not in example
        circuit = family == "F." and "Circuit" in example and "District Court" not in example
        state = family in _REGIONS and place in example and _STATE_COURT.search(example)
        if usable and (family in _SUPREME or circuit or state):
            names.append(example)
    return tuple(dict.fromkeys(names))


def _directions(name: str) -> set[str]:
    found = {_DIRECTIONS[letter] for letter in re.findall(r"\b([NSEWCM])\. ?D\.", name)}
    return {*found, *(word for word in _DIRECTIONS.values() if word in name)}


# --- diagnoses -------------------------------------------------------------------------------------------------------


def icd10cm_chapters(rows: int, seed: int) -> Iterator[Conversation]:
    """Diagnosis wordings (titles of categories and subcategories, and inclusion terms) and their chapter's title.

    A wording that stands in two chapters is left out. `extra` holds code, kind and chapter number.
    Raises RecipeError when simple-icd-10-cm is missing.
    """
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise _missing("icd10cm_chapters", "simple-icd-10-cm") from None
    found: dict[str, tuple[str, str, str, str]] = {}
    chapters_of: dict[str, set[str]] = {}
    chapter = ""
    for code in icd.get_all_codes():
        if icd.is_chapter(code):
            chapter = code
        if icd.is_chapter_or_block(code):
            continue
        wordings = [(term, "inclusion") for term in icd.get_inclusion_term(code)]
        if len(code) <= _SUBCATEGORY_LENGTH:
            wordings.append((icd.get_description(code), "title"))
        for wording, kind in wordings:
            chapters_of.setdefault(wording.casefold(), set()).add(chapter)
            found.setdefault(wording.casefold(), (wording, code, kind, chapter))
    clear = [found[key] for key, chapters in chapters_of.items() if len(chapters) == 1]
    for number, (wording, code, kind, chapter) in enumerate(islice(_shuffled(clear, seed), rows), start=1):
        title = re.sub(r" \([A-Z0-9]+-[A-Z0-9]+\)$", "", icd.get_description(chapter))
        extra = {"code": code, "kind": kind, "chapter": int(chapter)}
        yield plain_row(wording, title, f"builtin:icd10cm_chapters:{number}", extra)


# A00 and A00.0: finer codes repeat their parent's title with a side or an encounter added.
_SUBCATEGORY_LENGTH = 5


# --- AWS calls -------------------------------------------------------------------------------------------------------

# Well-known services first, so that a small set asks about calls that people know.
_FIRST_SERVICES = (
    "s3", "ec2", "iam", "lambda", "dynamodb", "sqs", "sns", "rds", "ecs", "eks", "ecr", "kms", "logs", "cloudwatch",
    "cloudformation", "route53", "elbv2", "autoscaling", "secretsmanager", "ssm", "sts", "stepfunctions", "kinesis",
    "firehose", "glue", "athena", "redshift", "elasticache", "cognito-idp", "apigateway", "events", "cloudfront",
)  # fmt: skip


def botocore_calls(rows: int, seed: int) -> Iterator[Conversation]:
    """The service's name with the first sentence of a call's documentation, and `service.method`, as in boto3.

    Whole services are taken, well-known ones first, until there are `rows` rows. Sentences that fit two calls are left
    out.
    Raises RecipeError when botocore is missing.
    """
    try:
        import botocore
        from botocore import xform_name
    except ImportError:
        raise _missing("botocore_calls", "botocore") from None
    folder = Path(botocore.__file__).parent / "data"
    known = {path.name for path in folder.iterdir() if any(path.glob("*/service-2.json.gz"))}
    first = [name for name in _FIRST_SERVICES if name in known]
    calls: dict[str, str] = {}
    for service in [*first, *_shuffled(sorted(known - set(first)), seed)]:
        model = json.loads(gzip.decompress(max(folder.glob(f"{service}/*/service-2.json.gz")).read_bytes()))
        metadata = model["metadata"]
        title = metadata.get("serviceAbbreviation") or metadata["serviceFullName"]
        said: dict[str, list[str]] = {}
        for name, operation in model["operations"].items():
            sentence = first_sentence(operation.get("documentation", ""))
            if sentence and not operation.get("deprecated"):
                said.setdefault(f"{title}: {sentence}", []).append(f"{service}.{xform_name(name)}")
        calls |= {prompt: names[0] for prompt, names in said.items() if len(names) == 1 and prompt not in calls}
        if len(calls) >= rows:
            break
    chosen = islice(_shuffled(list(calls.items()), seed), rows)
    for number, (prompt, call) in enumerate(chosen, start=1):
        yield plain_row(prompt, call, f"builtin:botocore_calls:{number}", {"service": call.split(".")[0]})


def first_sentence(documentation: str) -> str:
    """The first sentence of HTML documentation as plain text; empty when it says too little (under three words)."""
    blocks = re.split(r"</p>|<note>|<important>|<ul>|<br ?/?>", documentation)
    texts = (" ".join(html.unescape(re.sub(r"<[^>]*>", "", block)).split()) for block in blocks)
    text = next((text for text in texts if text), "")
    sentence = re.split(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])", text, maxsplit=1)[0]
    return sentence if len(sentence.split()) >= 3 else ""


# --- shared ----------------------------------------------------------------------------------------------------------


def _shuffled(values: Sequence[T], seed: int) -> Iterator[T]:
    """In the order of a hash: independent of the generator's history, and stable when values are added."""
    return iter(sorted(values, key=lambda value: content_id(seed, value)))


def _missing(task: str, packages: str) -> RecipeError:
    return RecipeError(f"builtin:{task} needs {packages}", where="data", fix="Run: pip install tunesmith[demo]")
