"""The actions of `fastdaa study`, one module each."""
