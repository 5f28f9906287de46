"""The split and the subject of a file, and whether it is a label map, from the names of files and folders.

A path here is the path of a file relative to the folder or zip, with slashes.
"""
import hashlib
import re

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          **dict.fromkeys(["validate", "validation", "val", "valid"], "validate")}  # {name of a folder: split}
# Words before the number of a subject, as in OAS1_0028, OAS30001, sub-01 (BIDS) or patient_3.
SUBJECT = re.compile(r"OAS[34][0-9]{4}|OAS[0-9]+_[0-9]+|(?<![a-z])(?:sub-[a-z]*[0-9][0-9a-z]*|"
                     r"(?:subject|subj|sub|patient|pat|case|participant|id)[-_ ]?[0-9]+)", re.IGNORECASE)
# The name of a folder that is not a subject: it may hold files of several subjects, or one visit of a subject.
VISIT = re.compile(r"(?:visit|ses|session|time|disc|disk|part|batch|fold|class|group|grade|stage)[-_ ]?[0-9]",
                   re.IGNORECASE)
LABELS = ("seg", "segs", "segmentation", "segmentations", "mask", "masks", "label", "labels")


def split_named(folder):
    """The split that the first or last word in the name of a folder names, as in train_images, else None.

    A name with the words of two splits, such as train_test, names none.
    """
    words = re.split("[-_ ]", folder.lower())
    named = {SPLITS[word] for word in words if word in SPLITS}
    return named.pop() if len(named) == 1 and not SPLITS.keys().isdisjoint((words[0], words[-1])) else None


def split_of(path):
    """The split that a file belongs to; None if no folder in its path names one.

    The topmost folder that is called train, val, … counts, or else the topmost one whose name contains such a word.
    """
    folders = path.split("/")[:-1]
    splits = [SPLITS.get(folder.lower()) for folder in folders] + list(map(split_named, folders))
    return next(filter(None, splits), None)


def is_label(path):
    """Whether a word in a path (FSL and SEG, labels and Tr) ends in seg, segmentation, mask, label or their plural."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", path)
    return any(word.lower().endswith(LABELS) for word in words)


def find_subjects(paths):
    """Return ({relative path: subject}, how the subjects were told apart).

    Rule 1: if a path contains a word for a subject with a number, the first such word is the subject. "Patient_01" and
    "patient-1" are one subject. For the other paths, see subjects_by_rules().
    """
    words = {path: SUBJECT.search(without_splits(path)) for path in paths}
    subjects, same = {}, {}
    for path in filter(words.get, paths):
        word = words[path].group()
        key = tuple(int(part) if part.isdigit() else part for part in re.findall("[0-9]+|[a-z]+", word.lower()))
        subjects[path] = same.setdefault(key, word)
    rest, how = subjects_by_rules([path for path in paths if not words[path]])
    if subjects:
        how = ["by the word and number in their paths", *how]
    return {**subjects, **rest}, " and ".join(how)


def subjects_by_rules(paths):
    """Return ({relative path: subject}, [how]) of files whose paths match SUBJECT nowhere, by the first rule that fits.

    how: the rule in words, for the user. The subject is:
    2. the path up to a folder with a number, at the smallest depth that fits. Folders that name splits do not count,
       and a folder such as visit2 is no subject, see VISIT;
    3. or the file's name up to its n-th number, if another number follows, for the smallest n that fits;
    4. or the path of the file.
    Rule 2 or 3 fits if nine of ten files get a subject, there are at least two subjects, and one of them has several
    files. A file that gets none is a subject of its own.
    """
    if not paths:
        return {}, []
    folders = {path: without_splits(path).split("/")[:-1] for path in paths}
    rules = [("by folder", {path: "/".join(parts[:depth + 1]) for path, parts in folders.items()
                            if len(parts) > depth and re.search("[0-9]", parts[depth])
                            and not VISIT.match(parts[depth])})
             for depth in range(max(map(len, folders.values())))]
    # Every second part of a name is a number.
    names = {path: re.split("([0-9]+)", path.rsplit("/", 1)[-1].rsplit(".", 1)[0]) for path in paths}
    rules += [(f"by the first {f'{n} numbers' if n > 1 else 'number'} in their names",
               {path: "".join(parts[:2 * n]) for path, parts in names.items() if len(parts) > 2 * n + 1})
              for n in range(1, max(map(len, names.values())) // 2)]
    for how, found in rules:
        if 10 * len(found) >= 9 * len(paths) and 1 < len(set(found.values())) < len(found):
            rest = {path: path for path in paths if path not in found}
            return {**found, **rest}, [how, *(["by file"] if rest else [])]
    return {path: path for path in paths}, ["by file"]


def without_splits(path):
    """A relative path without the folders that name splits, except those with a number, which may be subjects."""
    *folders, name = path.split("/")
    return "/".join([part for part in folders if not split_named(part) or re.search("[0-9]", part)] + [name])


def last_tenth(items):
    """The last tenth of a list, at least one item, but none of a single one."""
    return items[len(items) - max(round(len(items) / 10), 1):] if len(items) > 1 else []


def validating(subjects, neighbours):
    """The set of subjects for validation if no folder is named validate: a tenth of the subjects, at least one.

    neighbours: whether subjects with neighbouring names may be images of one head. Then the last tenth in natural order
    is chosen, else a pseudo-random tenth that is fixed by the names. In both cases a new subject moves at most one
    other subject between training and validation. If there is only one subject, the set is empty.
    """
    def rank(subject):
        return hashlib.blake2b(subject.encode(errors="surrogateescape")).digest()

    return set(last_tenth(sorted(set(subjects), key=natural) if neighbours else
                          sorted(set(subjects), key=rank, reverse=True)))


def natural(text):
    """A key for sorting texts, with which "a2" comes before "a10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text))]
