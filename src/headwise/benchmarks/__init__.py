"""What headwise costs, each measured with its peers beside it in the same run: `headwise bench NAME`."""
