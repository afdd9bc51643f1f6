"""The errors that the user can cause: of the data, and of the config."""


class DataError(ValueError):
  """A problem with the user's data, told in one line.

  The line names the file or the value and says what to change. It is raised in
  the process that iterates, whichever thread or process found the problem.
  """


class MissingFileError(DataError):
  """There is no such file."""


class EmptyFileError(DataError):
  """The file has no bytes."""


class UnreadableFileError(DataError):
  """The file is damaged, truncated, or no image."""


class AmbiguousIdError(DataError):
  """Two files have the same id.

  Attributes:
    path: of one of them.
  """

  def __init__(self, message: str, path: str):
    super().__init__(message)
    self.path = path


class MaskFormatError(DataError):
  """The mask is stored in a way that cannot be read as class ids."""


class LabelError(DataError):
  """The mask holds a value or a colour that is no class."""


class RecordError(DataError):
  """An image, or its mask, cannot be used.

  Attributes:
    id: of the image.
  """

  def __init__(self, message: str, id: str):
    super().__init__(message)
    self.id = id


class ConfigError(ValueError):
  """One line that names the key, its value and the fix."""
