"""Commands that make data sets: csv_to_tfrecord (from CSV) and make_sample (generated)."""
