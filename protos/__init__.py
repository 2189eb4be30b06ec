"""What two processes of different versions must agree on: messages (muster/v1) and arithmetic
(contract).
"""
