"""Raw logs to records: TFRecord shards and schema.json. No TensorFlow is imported.

Data flows one way: a format (columns, aliexpress, aliccp) makes a Source of tables; the training
rows are scanned for the schema (learn); rows are split (splits), encoded by the schema (encode),
and the folder appears when all of it is written (output). `command` is the command and `convert`.
"""
