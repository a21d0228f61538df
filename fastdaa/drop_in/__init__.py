"""Other libraries' preference losses and trainers, under their own names, on the head of fastdaa.

Change the import, keep the script: :mod:`fastdaa.drop_in.liger` for Liger's chunked preference
losses (needs torch alone), :mod:`fastdaa.drop_in.trl` for TRL's trainers. Nothing is imported
until one of them is.
"""
