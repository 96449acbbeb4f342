"""Writes a generated exposure log as a CSV file. Your own log may have the same structure.

    python examples/make_log.py log.csv
    python examples/make_log.py log.csv 5000      # rows; default 50,000

A session shows five items to one user on one day. Cheap items are clicked more often, and so are
items shown in Paris. Younger users buy more often.
"""

import csv
import random
import sys

ITEMS, USERS, CITIES = 200, 2000, ("Paris", "Lyon", "Nice", "Lille")


def main() -> None:
    path, rows = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50_000
    rng = random.Random(0)
    price = [round(rng.lognormvariate(3, 0.7), 2) for _ in range(ITEMS)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["session", "day", "user", "age", "city", "item", "price", "clicked", "bought"]
        )
        for row in range(rows):
            if row % 5 == 0:
                session, day = f"s{row // 5}", f"2026-01-{1 + row * 28 // rows:02}"
                user, city = rng.randrange(USERS), rng.choice(CITIES)
            item = rng.randrange(ITEMS)
            click_rate = 0.03 + 0.1 * (price[item] < 15) + 0.05 * (city == "Paris")
            clicked = rng.random() < click_rate
            years = 18 + user % 50
            bought = clicked and rng.random() < 0.1 + 0.3 * (years < 35)
            age = "" if user % 10 == 0 else years  # unknown for one user in ten
            writer.writerow(
                [session, day, f"u{user}", age, city, item, price[item], int(clicked), int(bought)]
            )


if __name__ == "__main__":
    main()
