package android.os

object Build {
    @JvmField val SUPPORTED_64_BIT_ABIS: Array<String> = arrayOf()
}
