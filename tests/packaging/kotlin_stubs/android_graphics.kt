package android.graphics

class Bitmap {
    enum class Config { ARGB_8888 }

    val width: Int get() = throw NotImplementedError()
    val height: Int get() = throw NotImplementedError()

    fun copy(config: Config, isMutable: Boolean): Bitmap = throw NotImplementedError()

    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) {
        throw NotImplementedError()
    }
}
