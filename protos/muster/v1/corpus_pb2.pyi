from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DatasetFile(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATASET_FILE_UNSPECIFIED: _ClassVar[DatasetFile]
    DATASET_FILE_MANIFEST: _ClassVar[DatasetFile]
    DATASET_FILE_TOKENIZER: _ClassVar[DatasetFile]
    DATASET_FILE_TRAINING_CHUNK: _ClassVar[DatasetFile]
    DATASET_FILE_HELDOUT_CHUNK: _ClassVar[DatasetFile]
    DATASET_FILE_INITIAL_STATE: _ClassVar[DatasetFile]
DATASET_FILE_UNSPECIFIED: DatasetFile
DATASET_FILE_MANIFEST: DatasetFile
DATASET_FILE_TOKENIZER: DatasetFile
DATASET_FILE_TRAINING_CHUNK: DatasetFile
DATASET_FILE_HELDOUT_CHUNK: DatasetFile
DATASET_FILE_INITIAL_STATE: DatasetFile

class FetchFileRequest(_message.Message):
    __slots__ = ("file", "chunk_index")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    file: DatasetFile
    chunk_index: int
    def __init__(self, file: _Optional[_Union[DatasetFile, str]] = ..., chunk_index: _Optional[int] = ...) -> None: ...

class FileMessage(_message.Message):
    __slots__ = ("data", "total_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    total_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...
