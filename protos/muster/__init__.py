"""Generated messages; see the .proto files in v1/."""
