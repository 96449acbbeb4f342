"""The study: what a loss is worth, by paired runs over seeds, and our models beside MTReclib's."""
