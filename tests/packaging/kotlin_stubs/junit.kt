package org.junit

@Retention(AnnotationRetention.RUNTIME)
@Target(AnnotationTarget.FUNCTION)
annotation class Test

object Assert {
    @JvmStatic
    fun assertTrue(message: String, condition: Boolean) = check(condition) { message }
}

object Assume {
    @JvmStatic
    fun assumeTrue(message: String, condition: Boolean) = Unit
}
