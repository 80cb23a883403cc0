"""The errors FlashCore raises on purpose. Each is also the builtin error a caller would expect to catch."""


class FlashCoreError(Exception):
    """Base of every error that FlashCore raises on purpose; the command line prints these as one line."""


class ArgumentValueError(FlashCoreError, ValueError):
    """An argument has a value that is not allowed: names the argument, what was given and what is allowed."""


class ArgumentTypeError(FlashCoreError, TypeError):
    """An argument has a type that is not allowed: names the argument, what was given and what is allowed."""


class UnsupportedError(FlashCoreError, NotImplementedError):
    """A named implementation cannot do what was asked on this device: names the implementation and the reason."""


class BinaryError(FlashCoreError, RuntimeError):
    """A kernel binary is missing, damaged, or was built for another GPU."""


class CompileError(FlashCoreError, RuntimeError):
    """A kernel could not be compiled: holds the compiler's own words."""


class DriverError(FlashCoreError, RuntimeError):
    """The CUDA driver is absent or refused a call: names the call and the driver's error."""


class ProfilerError(FlashCoreError, RuntimeError):
    """The profiler, or the call that it was to profile, failed: says what that means and what to do."""
