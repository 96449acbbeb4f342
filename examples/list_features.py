"""Lists in a log: tags with weights, and the items that a user clicked before.

    python examples/list_features.py lists

It writes lists/log.csv and lists/log.toml, and converts them to lists/data, which `pwiser train`
takes. A user often clicks items with a tag that an item of the history has.
"""

import pathlib
import random
import subprocess
import sys

ITEMS, USERS, ROWS = 200, 300, 20_000
TAGS = ("red", "blue", "new", "sale", "wool", "silk")
FEATURES = """\
[labels]
click = "clicked"
conversion = "bought"

[columns]
time = "time"

[features.item]
dtype = "int64"

[features.tags]
type = "list"
dtype = "string"
separator = "|"
weight_separator = ":"

[features.history]
type = "sequence"
vocabulary = "item"
separator = " "
newest = "last"
max_length = 10
"""


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir()
    (folder / "log.toml").write_text(FEATURES)
    rng = random.Random(0)
    tags = [rng.sample(TAGS, rng.randrange(3)) for _ in range(ITEMS)]
    history: list[list[int]] = [[] for _ in range(USERS)]
    with open(folder / "log.csv", "w", encoding="utf-8") as file:
        file.write("time,item,tags,history,clicked,bought\n")
        for time in range(ROWS):
            user, item = rng.randrange(USERS), rng.randrange(ITEMS)
            met = {tag for clicked in history[user] for tag in tags[clicked]}
            clicked = rng.random() < 0.05 + 0.3 * bool(met & set(tags[item]))
            bought = clicked and rng.random() < 0.2
            weighted = "|".join(f"{tag}:{1 / k}" for k, tag in enumerate(tags[item], 1))
            before = " ".join(map(str, history[user]))
            file.write(f"{time},{item},{weighted},{before},{clicked},{bought}\n")
            if clicked:
                history[user].append(item)
    subprocess.run(
        [
            *(sys.executable, "-m", "pwiser_tf.convert", f"--features={folder / 'log.toml'}"),
            *(f"--train={folder / 'log.csv'}", f"--output_dir={folder / 'data'}"),
        ],
        check=True,
    )


if __name__ == "__main__":
    main()
