"""The feature file: what it says, and what it refuses."""

import pytest

from pwiser_tf.convert import features
from pwiser_tf.errors import DataError

WHOLE = r"""
[labels]
click = "clicked"
conversion = "bought"
weight = "w"
conversion_without_click = "click"
[columns]
group = "session"
time = "ts"
segments = ["country", "slot"]
missing = ["", "-"]
[features.user]
side = "user"
min_count = 3
[features.item]
dtype = "int64"
max_vocabulary = 1000
[features.history]
type = "sequence"
column = "last items"
separator = "|"
weight_separator = ":"
vocabulary = "item"
max_length = 20
newest = "last"
[features.tags]
type = "list"
hash_buckets = 512
separator = " "
[features."price (€)"]
type = "numerical"
transform = "quantiles"
buckets = 8
clip = [0, 1e3]
[features.embedding]
type = "vector"
length = 16
separator = ";"
"""


def _read(tmp_path, text):
    path = tmp_path / "log.toml"
    path.write_text(text, encoding="utf-8")
    return features.read(path)


def test_every_key(tmp_path):
    log = _read(tmp_path, WHOLE)
    assert (log.click, log.conversion, log.weight) == ("clicked", "bought", "w")
    assert log.conversion_without_click == "click"
    assert (log.group, log.time, log.segments) == ("session", "ts", ("country", "slot"))
    assert log.missing == ("", "-")
    user, item, history, tags, price, embedding = log.features
    assert (user.type, user.column, user.side, user.min_count) == ("categorical", "user", "user", 3)
    assert (item.dtype, item.max_vocabulary) == ("int64", 1000)
    assert (history.column, history.vocabulary, history.max_length) == ("last items", "item", 20)
    assert (history.newest, history.weighted) == ("last", True)
    assert (tags.hash_buckets, tags.weighted, tags.max_length) == (512, False, 50)
    assert (price.transform, price.buckets, price.clip) == ("quantiles", 8, (0.0, 1000.0))
    assert (embedding.length, embedding.separator) == (16, ";")
    assert features.Log.from_json(log.to_json()) == log


def test_the_short_flags_mean_the_same(tmp_path):
    text = '[labels]\nclick = "c"\n[columns]\ngroup = "g"\n[features.a]\n[features.b]\n'
    assert _read(tmp_path, text + 'type = "numerical"\n') == features.from_flags(
        categorical=["a"], numerical=["b"], click="c", conversion=None, group="g"
    )


ITEM = '[labels]\nclick = "c"\n[features.item]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[labels]\nclick = ", "expected a feature file in TOML"),
        ("[features.a]\n", r"table \[labels\], key click: expected a column's name"),
        ('[labels]\nclick = "c"\n', "expected at least one feature"),
        ("[label]\n", "table the top level, key label: unknown; expected one of labels, columns"),
        (ITEM + 'typ = "list"', r"table \[features\.item\], key typ: unknown; expected one of col"),
        (ITEM + 'type = "set"', r"key type: found 'set', expected one of categorical, list"),
        (ITEM + "min_count = 0", "key min_count: found 0, expected at least 1"),
        (ITEM + "min_count = 2.5", "key min_count: found 2.5, expected an integer"),
        (ITEM + "min_count = true", "key min_count: found True, expected an integer"),
        (ITEM + "column = 3", "key column: found 3, expected a text"),
        (ITEM + "max_length = 3", "key max_length: not for type categorical"),
        (ITEM + 'separator = "|"', "key separator: not for type categorical"),
        (ITEM + "hash_buckets = 9\nmin_count = 2", "key min_count: impossible beside hash_buckets"),
        (ITEM + 'vocabulary = "shop"', "key vocabulary: shop is no feature with ids"),
        (ITEM + 'vocabulary = "item"', "key vocabulary: item itself uses that of item"),
        (ITEM + 'type = "vector"', "key length: expected the number of floats"),
        (ITEM + 'type = "numerical"\nclip = [3, 1]', r"key clip: expected \[least, greatest\]"),
        (ITEM + 'type = "numerical"\nclip = ["a"]', "key clip: .* expected a list of numbers"),
        (
            ITEM + 'type = "numerical"\nbuckets = 4',
            'key buckets: goes with transform = "quantiles"',
        ),
        (ITEM + 'type = "list"\nweight_separator = ":"', "key weight_separator: needs a separator"),
        (ITEM + 'column = "c"', "key column: c is the label of a click"),
        ('[labels]\nclick = "c"\nconversion = "c"\n[features.a]\n', "are both column c"),
        ('[labels]\nclick = "c"\n[columns]\nsegments = "x"\n[features.a]\n', "a list of texts"),
    ],
)
def test_what_is_refused_by_file_table_and_key(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "log.toml"))
