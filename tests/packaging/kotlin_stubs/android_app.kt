package android.app

class ActivityManager {
    class MemoryInfo {
        @JvmField var availMem: Long = 0
        @JvmField var threshold: Long = 0
        @JvmField var lowMemory: Boolean = false
    }

    fun getMemoryInfo(into: MemoryInfo) {
        throw NotImplementedError()
    }
}
