"""The split and the subject of a file, and whether it is a label map, from the names of files and folders.

A path here is the path of a file relative to the folder or zip, with slashes.
"""
import hashlib
import re

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          **dict.fromkeys(["validate", "validation", "val", "valid"], "validate")}  # {name of a folder: split}
# Words before the number of a subject, as in OAS1_0028, sub-01 (BIDS) or patient_3.
SUBJECT = re.compile(r"OAS[0-9]+_[0-9]+|(?<![a-z])(?:sub-[a-z]*[0-9][0-9a-z]*|"
                     r"(?:subject|subj|sub|patient|pat|case|participant|id)[-_ ]?[0-9]+)", re.IGNORECASE)
# The name of a folder that is not a subject: it may hold files of several subjects, or one visit of a subject.
VISIT = re.compile(r"(?:visit|ses|session|time|disc|disk|part|batch|fold|class|group|grade|stage)[-_ ]?[0-9]",
                   re.IGNORECASE)
LABELS = ("seg", "segs", "segmentation", "segmentations", "mask", "masks", "label", "labels")


def split_of(path):
    """The split that a file belongs to, by the first folder in its path that names a split; None if none does."""
    return next((SPLITS[part.lower()] for part in path.split("/")[:-1] if part.lower() in SPLITS), None)


def is_label(path):
    """Whether a word in a path ends in seg, segmentation, mask or label, or their plural, as in FSL_SEG or labelsTr."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", path)
    return any(word.lower().endswith(LABELS) for word in words)


def find_subjects(paths):
    """Return ({relative path: subject}, how the subjects were told apart).

    If a path contains a word for a subject with a number, the first such word is the subject; else see others().
    "Patient_01" and "patient-1" are one subject.
    """
    words = {path: SUBJECT.search(without_splits(path)) for path in paths}
    subjects, same = {}, {}
    for path in filter(words.get, paths):
        word = words[path].group()
        key = re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"[-_ ]+", "" if word[:3] != "OAS" else "-", word.lower()))
        subjects[path] = same.setdefault(key, word)
    rest, how = others([path for path in paths if not words[path]])
    if subjects:
        how = ["by the word and number in their paths", *how]
    return {**subjects, **rest}, " and ".join(how)


def others(paths):
    """Return ({relative path: subject}, [how]) of files whose paths match SUBJECT nowhere, by the first rule that fits.

    how: the rule in words, for the user. The subject is:
    1. the path up to a folder with a number, at the smallest depth that fits. Folders that name splits do not count,
       and a folder such as visit2 is no subject, see VISIT;
    2. or the file's name up to its first number, if another number follows;
    3. or the path of the file.
    Rule 1 or 2 fits if nine of ten files get a subject, there are at least two subjects, and one of them has several
    files. A file that gets none is a subject of its own.
    """
    if not paths:
        return {}, []
    folders = {path: without_splits(path).split("/")[:-1] for path in paths}
    rules = [("by folder", {path: "/".join(parts[:depth + 1]) for path, parts in folders.items()
                            if re.search("[0-9]", "".join(parts[depth:depth + 1])) and not VISIT.match(parts[depth])})
             for depth in range(max(map(len, folders.values())))]
    names = {path: re.match(r"([^0-9]*[0-9]+)[^0-9]+[0-9]", path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
             for path in paths}
    rules.append(("by the first number in their names", {path: match[1] for path, match in names.items() if match}))
    for how, found in rules:
        if 10 * len(found) >= 9 * len(paths) and 1 < len(set(found.values())) < len(found):
            rest = {path: path for path in paths if path not in found}
            return {**found, **rest}, [how, *(["by file"] if rest else [])]
    return {path: path for path in paths}, ["by file"]


def without_splits(path):
    """A relative path without the folders that name splits."""
    *folders, name = path.split("/")
    return "/".join([part for part in folders if part.lower() not in SPLITS] + [name])


def tenth(count):
    """How many of `count` subjects are used for validation: a tenth, at least one, but none of a single subject."""
    return max(round(count / 10), 1) if count > 1 else 0


def validating(subjects):
    """The set of subjects for validation if no folder is named validate: a tenth of the subjects, at least one.

    The set depends on the names of the subjects alone. A new subject moves at most one other subject between training
    and validation. If there is only one subject, the set is empty.
    """
    def rank(subject):
        return hashlib.blake2b(subject.encode(errors="surrogateescape")).digest()

    ranked = sorted(set(subjects), key=rank)
    return set(ranked[:tenth(len(ranked))])


def natural(text):
    """A key for sorting texts, with which "a2" comes before "a10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text))]
