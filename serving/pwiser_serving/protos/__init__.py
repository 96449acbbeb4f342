"""The messages on the wire. `*_pb2.py` are generated from the `.proto` files beside them."""
