"""The one error that the user's data can cause."""


class DataError(ValueError):
  """A problem with the user's data, told in one line.

  The line names the file or the value and says what to change. It is raised in
  the process that iterates, whichever thread or process found the problem.
  """
