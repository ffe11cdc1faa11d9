"""Units with real files, real locks and real sockets; the engine is a fake where the loop is tested."""
